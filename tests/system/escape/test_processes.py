"""Processes of the host and of other containers: not there, under no number.

A PID namespace (pid_namespaces(7)) has no words for a process outside of it, so each call that takes a number answers
ESRCH; and ptrace(2)'s own check would ask for capabilities in the other's user namespace.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess

import pytest

from insula.kernel import syscalls
from tests.forked import errno_of, forked
from tests.support.wait import patiently
from tests.system.escape.attacks import processes, runtime
from tests.system.escape.attacks.calls import syscall
from tests.system.escape.cell import Cell, unguarded
from tests.system.escape.conftest import CellFactory
from tests.system.escape.test_exhaustion import enter

CONTAINER = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def test_only_own_processes_are_visible(cell: Cell, neighbour: Cell) -> None:
    """Every number from 1 to 4095 is asked for: a process that /proc doesn't list may still take signals."""
    assert len(processes.seen()) > 5, "the control: outside there are many"
    seen = cell.gets(processes.seen)
    assert seen[0] == 1 and len(seen) <= 4, seen


def test_numbers_of_the_host_mean_nothing(cell: Cell, neighbour: Cell) -> None:
    """kill, pidfd_open, ptrace, process_vm_readv, /proc/PID by the numbers that the host has for a neighbour's PID 1,
    and for a process of the host's."""
    with subprocess.Popen(["sleep", "60"]) as victim:
        assert processes.number_of(victim.pid)["ptrace"] == "" and processes.number_of(victim.pid)["kill"] == ""
        for pid in (neighbour.pid, victim.pid, os.getpid()):
            found = cell.gets(processes.number_of, pid + 100_000)
            for way, error in cell.gets(processes.number_of, pid).items():
                assert error in {"ESRCH", "ENOENT", "EPERM"}, (way, error)
                assert error == found[way], "no different from a number that nobody has"
        victim.kill()


def test_a_signal_to_all(cells: CellFactory, cell: Cell, neighbour: Cell) -> None:
    """kill(-1, SIGKILL) by the root of a container: everybody whom he may signal."""
    suicide = cells(cell.cli)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        suicide.start(processes.ended_by_everybody).wait(patiently(20))
        assert neighbour.answers() and cell.answers() and bystander.poll() is None
        assert suicide.answers(), "PID 1 of the namespace is spared"
    finally:
        bystander.kill()
        bystander.wait()


def test_pid_1_takes_no_signals_from_inside(cell: Cell) -> None:
    """The kernel drops signals that PID 1 has no handler for when they come from its own namespace: even SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        cell.cli.run("exec", cell.name, "kill", f"-{int(number)}", "1")
    assert cell.answers()


def test_no_namespace_can_be_entered(cell: Cell) -> None:
    """setns(2) on what /proc/1/ns shows; and were there a descriptor from the host's, it would be the same call."""
    assert set(cell.gets(processes.namespaces_entered, 1).values()) <= {"EPERM", "ENOENT"}
    control = unguarded(processes.namespaces_entered, 1)
    assert control.value["mnt"] == "" and control.value["net"] == "", "the control"


def test_the_root_of_another_process(cell: Cell) -> None:
    """/proc/PID/root follows into the other's mount namespace: all that there are here lead to the container's own."""
    with subprocess.Popen(["sleep", "60"]) as child:
        assert processes.root_of(child.pid, "/etc/passwd").startswith("root:"), "the control"
        child.kill()
    assert cell.gets(processes.root_of, 1, "/etc/passwd") == "root:x:0:0::/root:/bin/sh\n"
    assert cell.try_(processes.root_of, 1, "/var/lib/dpkg/status").errno == "ENOENT"


def test_two_tenants_share_nothing(cell: Cell, neighbour: Cell, cells: CellFactory) -> None:
    """Not a uid, not a namespace, not a control group above them; and two containers of one tenant no namespace
    either."""
    second = cells(cell.cli)
    inside = {one: one.gets(processes.identity) for one in (cell, second, neighbour)}
    for kind in CONTAINER:
        own = os.readlink(f"/proc/self/ns/{kind}")
        assert len({own, *(identity["namespaces"][kind] for identity in inside.values())}) == 4, kind
    uids, groups = {}, {}
    for one in inside:
        status = open(f"/proc/{one.pid}/status").read()  # noqa: SIM115
        uids[one] = next(line.split()[1] for line in status.splitlines() if line.startswith("Uid:"))
        lines = open(f"/proc/{one.pid}/cgroup").read().splitlines()  # noqa: SIM115
        groups[one] = {os.path.dirname(line.split(":", 2)[2]) for line in lines if str(one.cli.tenant) in line}
    assert uids[cell] == uids[second] != uids[neighbour]
    assert groups[cell] == groups[second] and groups[cell] and groups[neighbour]
    assert not groups[cell] & groups[neighbour]


def test_two_uids_cannot_touch_each_other(cell: Cell, neighbour: Cell) -> None:
    """Were all namespaces gone: a process with the uid of one tenant's root may not signal or trace the other's."""

    def as_tenant(one: Cell) -> dict[str, str]:
        uid = os.stat(f"/proc/{one.pid}").st_uid
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return processes.number_of(neighbour.pid)

    assert forked(lambda: as_tenant(neighbour))["kill"] == "", "the control: its own may"
    found = forked(lambda: as_tenant(cell))
    assert {found[way] for way in ("kill", "ptrace", "process_vm_readv", "proc")} <= {"EPERM", "EACCES"}


def test_no_key_is_shared(cell: Cell, neighbour: Cell) -> None:
    """A user's keyring (user-keyring(7)) belongs to a uid in a user namespace. Seen by processes that joined both
    containers without their seccomp filter, which refuses keyctl(2) altogether: the neighbour finds nothing, not by
    name and not by number."""

    def put() -> int:
        enter(cell.pid)
        syscalls.join_session_keyring("insula-escape")
        return syscall("add_key", b"user", b"insula-escape-key", b"secret", 6, runtime.USER)

    def get(one: Cell) -> str:
        enter(one.pid)
        syscalls.join_session_keyring("insula-escape")
        syscall("keyctl", runtime.KEYCTL_LINK, runtime.USER, runtime.SESSION)
        return runtime.key_of_the_session("insula-escape-key")

    number = forked(put)
    assert forked(lambda: get(cell)) == "secret", "the control"
    assert forked(lambda: errno_of(lambda: get(neighbour))) == errno.ENOKEY

    def read_by_number() -> int:
        enter(neighbour.pid)
        return syscall("keyctl", runtime.KEYCTL_READ, number, None, 0, 0)

    assert forked(lambda: errno_of(read_by_number)) in {errno.EACCES, errno.ENOKEY}


@pytest.fixture(scope="module", autouse=True)
def _alive(cell: Cell, neighbour: Cell) -> None:
    assert cell.answers() and neighbour.answers()
