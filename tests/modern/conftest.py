"""One virtual machine for all tests of this directory: they run in the order in which they are written.

`inside` is for the machine itself, see test_inside.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY
from tests.support.guest import CHECKOUT, Guest

BUILD_TIMEOUT = 600

collect_ignore = [] if os.environ.get("INSULA_TEST_INSIDE") else ["inside"]


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    made = subprocess.run(
        [REPOSITORY / "scripts" / "guest"], capture_output=True, text=True, timeout=BUILD_TIMEOUT, check=False
    )
    if made.returncode:
        pytest.skip(f"no virtual machine: {(made.stderr.strip() or 'scripts/guest failed').splitlines()[-1]}")
    guest = Guest(Path(made.stdout.strip()), tmp_path_factory.mktemp("guest"))
    try:
        guest.wait_until_booted()
        guest.ok(f"mkdir -p {CHECKOUT} && tar -x -f /dev/vdb -C {CHECKOUT}")
        yield guest
    finally:
        guest.close()
