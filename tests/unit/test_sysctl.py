"""Settings of network namespaces, which are written through a procfs that is replaced now and then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from insula.kernel.netns import call_in_new
from insula.network.linux import sysctl

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")

NAME = "ipv4/ip_unprivileged_port_start"
ROUNDS = 3 * sysctl.Procfs.USES


@pytest.fixture
def procfs() -> Iterator[sysctl.Procfs]:
    with closing(sysctl.Procfs()) as found:
        yield found


def test_settings_are_those_of_the_callers_namespace(procfs: sysctl.Procfs) -> None:
    def inside(value: int) -> str | None:
        sysctl.write({NAME: str(value), "ipv4/no-such-setting": "1", "no-such-directory/x": "1"}, procfs)
        return sysctl.read(NAME)

    host = sysctl.read(NAME)
    before = len(os.listdir("/proc/self/fd"))
    assert [call_in_new(lambda n=n: inside(n)) for n in range(ROUNDS)] == [str(n) for n in range(ROUNDS)]  # type: ignore[misc]
    assert sysctl.read(NAME) == host
    assert len(os.listdir("/proc/self/fd")) == before + 1  # the procfs


def test_threads_write_settings_at_the_same_time(procfs: sysctl.Procfs) -> None:
    def inside(value: int) -> str | None:
        sysctl.write({NAME: str(value)}, procfs)
        return sysctl.read(NAME)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: call_in_new(lambda: inside(n)), range(ROUNDS)))
    assert found == [str(n) for n in range(ROUNDS)]
