"""One virtual machine for all tests of this directory: they run in the order in which they are written."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY
from tests.support.guest import CHECKOUT, Guest
from tests.support.images import Layout, member, tar

BUILD_TIMEOUT = 600


def many_layers(path: Path, count: int = 127) -> Path:
    """An archive of an image of that many layers, each with a file; the lowest has busybox."""
    busybox = Path("/bin/busybox").read_bytes()
    lowest = tar(member("bin"), member("bin/busybox", busybox, mode=0o755), member("bin/ls", linkname="busybox"))
    layers = [lowest, *(tar(member(f"layer{number}", b"")) for number in range(1, count))]
    layout = Layout()
    layout.image(layers, name="layers:latest")
    path.write_bytes(layout.tar())
    return path


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    made = subprocess.run(
        [REPOSITORY / "scripts" / "guest"], capture_output=True, text=True, timeout=BUILD_TIMEOUT, check=False
    )
    if made.returncode:
        pytest.skip(f"no virtual machine: {(made.stderr.strip() or 'scripts/guest failed').splitlines()[-1]}")
    scratch = tmp_path_factory.mktemp("guest")
    guest = Guest(Path(made.stdout.strip()), scratch, [many_layers(scratch / "layers.tar")])
    try:
        guest.wait_until_booted()
        guest.ok(f"mkdir -p {CHECKOUT} && tar -x -f /dev/vdb -C {CHECKOUT}")
        yield guest
    finally:
        guest.close()
