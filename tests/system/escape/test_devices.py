"""Device nodes: a process that opens the disk's node reads and writes all files, below every file system.

In a user namespace mknod(2) makes none (CAP_MKNOD must count in the first one), images may bring none, the root and all
other mounts that a tenant could put one on have MS_NODEV, and the control group lets harmless ones through only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from insula.kernel import cgroups
from tests.forked import errno_of, forked
from tests.support.cli import Cli
from tests.support.images import member, tar
from tests.system.escape.attacks import files
from tests.system.escape.cell import Cell, unguarded
from tests.system.escape.conftest import CellFactory

HARMLESS = {"c 1:3", "c 1:5", "c 1:7", "c 1:8", "c 1:9", "c 5:0", "c 5:2"}


def test_no_device_node_can_be_made(cell: Cell, cells: CellFactory, tenant: Cli, tmp_path: Path) -> None:
    """mknod(2) of memory, kernel log and each of the host's disks; Docker's default set has CAP_MKNOD, and so has
    ours."""
    disks = files.disks()
    assert disks, "everybody may read /proc/partitions"
    control = unguarded(files.nodes, str(tmp_path))
    assert len(control.value) >= len(disks), "the control: the host's root makes them"
    places = ("/", "/tmp", "/dev", "/dev/shm", "/root")
    assert cell.gets(files.nodes, *places) == []
    assert cells(tenant, "--cap-add", "ALL", "--tmpfs", "/mnt").gets(files.nodes, *places, "/mnt") == []


def test_dev_has_only_harmless_devices(cell: Cell) -> None:
    found = set(cell.gets(files.devices_there))
    assert {"c 1:3", "c 1:5"} <= found
    assert {name for name in found if not name.startswith("c 136:")} <= HARMLESS


def test_a_node_in_an_image(cell: Cell, tmp_path: Path) -> None:
    """A layer with `sda` and `kmsg` in it: they are left out, which is told by name; the rest is there."""
    nodes = [member("sda", kind=b"4", devmajor=8, devminor=0), member("kmsg", kind=b"3", devmajor=1, devminor=11)]
    program = Path("/bin/busybox").read_bytes()
    rootfs = [member("bin/busybox", program, mode=0o755), *nodes, member("file", b"")]
    (tmp_path / "layer.tar").write_bytes(tar(*rootfs))
    done = cell.cli.run("image", "import", tmp_path / "layer.tar", "node")
    assert done.out == "node:latest\n" and "device node 'sda' and 1 more left out" in done.err
    names = cell.cli.ok("run", "--rm", "--network", "none", "node", "/bin/busybox", "ls", "/").split()
    assert "file" in names and not {"sda", "kmsg"} & set(names)
    cell.cli.ok("image", "rm", "node")


def test_a_node_that_was_smuggled_in(cell: Cell) -> None:
    """Were there one on the root (by a bug elsewhere; here the host's root puts it there): MS_NODEV makes it none."""
    path = cell.upper / "zero"
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    try:
        os.chown(path, cell.upper.stat().st_uid, cell.upper.stat().st_gid)
        assert forked(lambda: files.opened(str(path), os.O_RDONLY)), "the control: on the host it is a device"
        assert "c 1:5" in cell.gets(files.devices_there)
        assert cell.try_(files.opened, "/zero", os.O_RDONLY).errno == "EACCES"
        assert cell.gets(files.opened, "/dev/zero", os.O_RDONLY), "the control: in /dev it is one"
    finally:
        path.unlink()


def test_the_control_group_allows_harmless_devices_only(cell: Cell, tmp_path: Path) -> None:
    """The last wall: a process with all of the host's rights, but in the container's group, opens no other device."""
    group = cgroups.of_process(cell.pid)
    assert group
    kmsg, zero = tmp_path / "kmsg", tmp_path / "zero"
    for path, number in ((kmsg, (1, 11)), (zero, (1, 5))):
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(*number))
    assert errno_of(lambda: os.open(kmsg, os.O_RDONLY)) == 0, "the control"

    def prisoner() -> list[int]:
        cgroups.join(cgroups.Cgroup(group).open())
        tries: list[Callable[[], object]] = [lambda: os.open(kmsg, os.O_RDONLY), lambda: os.open(zero, os.O_RDONLY)]
        tries.append(lambda: os.mknod(tmp_path / "mem", stat.S_IFCHR | 0o600, os.makedev(1, 1)))
        return [errno_of(attempt) for attempt in tries]

    assert forked(prisoner) == [1, 0, 1], "EPERM, allowed, EPERM"
