"""Files of the kernel: a write could change the host, and a read could reveal other tenants.

Root in a container is nobody outside: such files belong to the host's root, so they are not his to write. On top of it
/proc/sys and /sys are read-only, and what tells too much is masked; to undo that takes mount(2), which is refused.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest

from tests.forked import forked
from tests.support.cli import Cli
from tests.system.escape.attacks import files
from tests.system.escape.cell import Cell, unguarded
from tests.system.escape.conftest import CellFactory

MASKED = ("/proc/cmdline", "/proc/diskstats", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/locks",
          "/proc/sys/kernel/pty", "/proc/timer_list", "/sys/firmware")  # fmt: skip
F_OFD_SETLK = 37  # fcntl(2)
NOT_OURS = {"EACCES", "EPERM", "EROFS", "ENOENT"}


@pytest.fixture(scope="module")
def strong(cells: CellFactory, tenant: Cli) -> Cell:
    """A cell whose tenant asked for every capability there is."""
    return cells(tenant, "--cap-add", "ALL")


def test_programs_that_the_kernel_starts(cell: Cell, strong: Cell) -> None:
    """core_pattern, modprobe, uevent_helper, binfmt_misc: a path written there is run as the host's root on the next
    crash, module or device (the usual last step of an escape, as in CVE-2022-0492 and CVE-2025-31133)."""
    there = [path for path in files.HELPERS if os.path.exists(path)]
    assert unguarded(files.opened, "/proc/sys/kernel/core_pattern").value, "the control: root may; nothing is written"
    for one in (cell, strong):
        for path, end in zip(there, one.ends(*((files.opened, path) for path in there)), strict=True):
            assert end.errno in NOT_OURS, (path, end)


def test_no_file_of_the_kernel_can_be_written(cell: Cell, strong: Cell) -> None:
    """All of /proc and /sys, file by file: what opens for writing must be the container's own."""
    control = unguarded(files.writable, "/proc/sys/kernel", "/proc/sys/vm", "/sys/kernel")
    assert {"/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory"} <= set(control.value), "the control"
    for one in (cell, strong):
        found = one.gets(files.writable, "/proc", "/sys")
        # pressure stall information is for everybody: what is written asks for a notice of one's own
        assert [path for path in found if not path.startswith("/proc/pressure/")] == []
    assert cell.gets(files.changed, "/proc", "/sys") == []


@pytest.mark.parametrize("path", ["/proc/sys", "/sys", "/sys/fs/cgroup", "/proc/sysrq-trigger"])
def test_read_only_mounts_stay_read_only(cell: Cell, strong: Cell, path: str) -> None:
    """A remount for writing. With CAP_SYS_ADMIN a tenant may do it to its own mounts, but does not own the files in
    them."""
    assert cell.try_(files.read_only_no_more, path).errno == "EPERM"
    strong.try_(files.read_only_no_more, path)
    assert strong.try_(files.opened, "/proc/sys/kernel/core_pattern").errno in NOT_OURS
    assert strong.try_(files.opened, "/proc/sysrq-trigger").errno in NOT_OURS


def test_no_cgroup_hierarchy_can_be_mounted(cell: Cell, strong: Cell) -> None:
    """CVE-2022-0492: release_agent of a control group hierarchy. Before Linux 5.17 its writer was not asked for
    CAP_SYS_ADMIN of the host, and mounting took a user namespace of one's own only."""
    control = unguarded(files.release_agent, "/tmp/insula-release")
    os.rmdir("/tmp/insula-release")
    if control.refused:
        pytest.skip(f"this kernel has no control groups of version 1: {control.why}")
    assert control.value == "/no/such/program", "the control"
    for one in (cell, strong):
        assert one.try_(files.release_agent, "/tmp/release").errno in {"EPERM", "EACCES"}
        assert "release_agent" not in one.cli.ok("exec", one.name, "find", "/sys/fs/cgroup", "-name", "release_agent")


def test_control_groups_cannot_be_changed(cell: Cell, strong: Cell) -> None:
    """A limit raised from inside, or a process moved out: the groups belong to the host's root."""
    limits = cell.cli.ok("exec", cell.name, "find", "/sys/fs/cgroup", "-name", "*pids.max").split()
    assert limits
    for one in (cell, strong):
        one.try_(files.read_only_no_more, os.path.dirname(limits[0]))
        for name in ("pids.max", "cgroup.procs"):
            end = one.try_(files.write, f"{os.path.dirname(limits[0])}/{name}", "max" if name == "pids.max" else "1")
            assert end.errno in {"EACCES", "EROFS"}, end


def test_masked_paths(cell: Cell, strong: Cell) -> None:
    """/proc/kcore is the memory of the machine, /proc/keys shows other tenants' keys. A tenant that removes the mask
    (which takes CAP_SYS_ADMIN in the container) finds a file that it doesn't own, or its own view of it."""
    there = [path for path in MASKED if Path(path).exists()]
    assert forked(lambda: len(files.read("/proc/interrupts"))) > 0, "the control"
    for path in there:
        if Path(path).is_dir():
            assert cell.cli.ok("exec", cell.name, "ls", path) == "", path
        else:
            assert cell.gets(files.read, path) == "", path
            assert cell.try_(files.uncovered, path).errno == "EPERM"
    assert strong.try_(files.uncovered, "/proc/kcore").errno in {"EPERM", "EACCES", "EINVAL", "ENOENT"}


def test_locks_of_others(cell: Cell, cells: CellFactory, neighbour: Cell) -> None:
    """Open file description locks have no PID, so no PID namespace hides them: /proc/locks has device, inode and 64
    bits that the owner chooses, of all locks on the host."""
    with open(neighbour.upper / "locked", "wb") as file:
        # struct flock (fcntl(2)): type, whence, start, length, pid
        fcntl.fcntl(file, F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 4242424242, 1, 0))
        assert "4242424242" in Path("/proc/locks").read_text(), "the control"
        nesting = cells(cell.cli, "--nesting")
        for one in (cell, nesting):
            assert one.gets(files.read, "/proc/locks") == ""
        assert "4242424242" in nesting.gets(files.uncovered, "/proc/locks"), "with --nesting the mask can be taken off"


def test_another_procfs(cell: Cell, strong: Cell) -> None:
    """A fresh procfs has no masks. The kernel grants one in a user namespace only where the old one is not covered
    (mnt_already_visible()), and even there the files belong to the host's root."""
    assert unguarded(files.another_proc, "/tmp/insula-proc").value, "the control"
    os.rmdir("/tmp/insula-proc")
    for one in (cell, strong):
        assert one.try_(files.another_proc, "/tmp/proc").errno in {"EPERM", "EACCES"}


def test_kernel_log_and_memory(cell: Cell, strong: Cell) -> None:
    """/dev/kmsg, /dev/mem, /dev/kvm and the like are not there; addresses in /proc/kallsyms are zeros
    (kptr_restrict)."""
    paths = [
        "/dev/kmsg",
        "/dev/mem",
        "/dev/kmem",
        "/dev/port",
        "/dev/fuse",
        "/dev/kvm",
        "/dev/net/tun",
        "/dev/vhost-vsock",
    ]
    for one in (cell, strong):
        assert set(one.gets(files.refusals, *paths).values()) == {"ENOENT"}
        assert one.try_(files.opened, "/proc/kmsg", os.O_RDONLY).errno in {"EPERM", "EACCES"}
        addresses = {line.split()[0] for line in one.gets(files.read, "/proc/kallsyms").splitlines()[:-1]}
        assert addresses <= {"0" * 16}, addresses


OWN = ("sys/net/", "sys/user/", "sys/fs/mqueue/", "sys/kernel/sem", "sys/kernel/shm", "sys/kernel/msg", "pressure/")
"""Below /proc, what belongs to namespaces of the container's own, and what is for everybody."""


def test_files_that_nesting_opens(cells: CellFactory, tenant: Cli) -> None:
    """`--nesting` allows mounts, and shows a whole proc and sysfs, writable: there only owners and namespaces guard.
    What opens for writing must belong to the container's own namespaces; release_agent and its kin stay shut."""
    nest = cells(tenant, "--nesting")
    whole = "/dev/.insula"
    found = nest.gets(files.writable, f"{whole}/proc", f"{whole}/sys")
    own = ("hostname", "domainname", "ns_last_pid", "auto_msgmni", "pid_max")  # of pid, ipc and uts namespaces
    assert f"{whole}/proc/sys/net/ipv4/ip_forward" in found, "the control: its own namespace's"
    others = [path.removeprefix(f"{whole}/proc/") for path in found if not path.startswith(f"{whole}/sys/")]
    assert [path for path in others if not path.startswith(OWN) and os.path.basename(path) not in own] == []
    devices = [path for path in found if path.startswith(f"{whole}/sys/")]
    assert [path for path in devices if "/net/eth0/" not in path and "/net/lo/" not in path] == []
    for helper in files.HELPERS:
        path = whole + helper
        assert not os.path.exists(helper) or nest.try_(files.opened, path).errno in NOT_OURS, path
    assert nest.try_(files.release_agent, "/tmp/release").errno in {"EPERM", "EACCES"}
    assert nest.gets(files.nodes, "/tmp", "/dev") == []
