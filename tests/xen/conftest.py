"""Domain 0 of Xen, for the tests of this directory."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY
from tests.support.guest import CHECKOUT
from tests.support.xen import Domain0


@contextmanager
def booted(kind: type[Domain0], scratch: Path) -> Iterator[Domain0]:
    """A domain 0 that has the checkout. What needs it is skipped if it can't be made."""
    made = subprocess.run([REPOSITORY / "scripts" / "xen"], capture_output=True, text=True, timeout=600, check=False)
    if made.returncode:
        pytest.skip(f"no domain 0: {(made.stderr.strip() or 'scripts/xen failed').splitlines()[-1]}")
    domain0 = kind(Path(made.stdout.strip()), scratch)
    try:
        domain0.wait_until_booted()
        domain0.ok(f"mkdir -p {CHECKOUT} && tar -x -f /dev/vdb -C {CHECKOUT}")
        yield domain0
    finally:
        domain0.close()


@pytest.fixture(scope="session")
def domain0(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Domain0]:
    with booted(Domain0, tmp_path_factory.mktemp("domain0")) as made:
        yield made
