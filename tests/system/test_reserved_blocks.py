"""Blocks that a file system reserves for root (mke2fs(8), -m): tenants can't use them, insulad can.

overlayfs writes with the user of whoever mounted it. As root it would take what an instance writes from the reserve.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.support import machine
from tests.support.daemon import Daemon

MIB = 1 << 20
RESERVED = 40


@pytest.fixture
def reserving(run_: machine.Run) -> Iterator[Daemon]:
    """An insulad whose state is on an ext4 of 160 MiB, of which a quarter is reserved."""
    daemon = Daemon(run_)
    image = daemon.path / "disk"
    try:
        with image.open("wb") as file:
            file.truncate(160 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-m", "25", image], check=True)
        daemon.root.mkdir()
        subprocess.run(["mount", "-o", "loop", image, daemon.root], check=True)
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


def test_an_instance_cannot_have_the_reserved_blocks(reserving: Daemon) -> None:
    cli, root = reserving.cli, reserving.root
    cli.ok("run", "-d", "--name", "hog", "busybox", "sleep", "600")
    said = cli.run("exec", "hog", "sh", "-c", "dd if=/dev/zero of=/full bs=64k count=4000")
    assert "No space left" in said.err, said
    assert int(cli.ok("exec", "hog", "stat", "-c", "%s", "/full")) > 40 * MIB, "the control: it had what is free"
    subprocess.run(["sync", "-f", root], check=True)
    found = os.statvfs(root)
    assert found.f_bavail * found.f_frsize < 2 * MIB, "nothing is left for others than root"
    assert found.f_bfree * found.f_frsize > (RESERVED - 5) * MIB, "and all that is reserved"
    (root / "of-root").write_bytes(bytes(5 * MIB))  # the control: root may have it
    assert "no space is left" in cli.fails("run", "--name", "late", "busybox", "true", status=125), "insulad goes on"
    cli.ok("exec", "hog", "rm", "/full")
    assert cli.ok("run", "--rm", "busybox", "echo", "again") == "again"
