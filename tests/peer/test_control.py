"""The engines work here: one container each with runc, their default runtime."""

from __future__ import annotations

import pytest

from tests.peer.conftest import Bench
from tests.support.peers import IMAGE


@pytest.mark.parametrize("name", ["podman", "docker"])
def test_with_runc(bench: Bench, name: str) -> None:
    engine = bench.engine(name, "runc")
    result = engine.run("run", "--rm", IMAGE, "sh", "-c", "echo out; exit 7")
    assert (result.status, result.out) == (7, "out\n")


def test_ctr_with_runc(bench: Bench) -> None:
    bench.engine("ctr", "runc")  # which runs one container to warm up
