"""Control groups that systemd makes: transient scopes of the systemd that runs this host.

For the virtual machine only (tests/modern/test_inside.py): the host that tests run on is not ours to ask.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from insula.kernel import cgroups
from insula.kernel.cgroups import Cgroup
from insula.kernel.cgroups.device_program import NAME
from insula.kernel.cgroups.systemd import Scope
from insula.kernel.ebpf import load as ebpf_load
from insula.model.errors import Failed
from tests.support.wait import until

MIB = 1 << 20
RESOURCES = {
    "memory": {"limit": 64 * MIB, "swap": 64 * MIB, "reservation": 8 * MIB},
    "cpu": {"shares": 512, "quota": 20_000, "period": 100_000, "cpus": "0"},
    "pids": {"limit": 20},
    "devices": [{"allow": False}, {"allow": True, "type": "c", "major": 1, "minor": 3}],
}


def show(unit: str, name: str) -> str:
    command = ["systemctl", "show", "--value", f"--property={name}", unit]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def reload() -> None:
    subprocess.run(["systemctl", "daemon-reload"], check=True)


@pytest.fixture
def scope() -> Iterator[Scope]:
    scope = Scope.parse(f"insulatest-a.slice:insula:c{os.getpid()}", "c")
    yield scope
    scope.stop()
    until(lambda: not Cgroup(scope.path).exists(), "the scope's group is gone")


@contextmanager
def started(scope: Scope) -> Iterator[tuple[Cgroup, int]]:
    """The scope with a process in it, as a container would be."""
    with scope.held(RESOURCES):
        group = Cgroup(scope.path)
        group.limit(RESOURCES)
        files = group.open()
        pid = os.fork()
        if pid == 0:
            try:
                cgroups.join(files)
                signal.pause()
            finally:
                os._exit(1)
        until(lambda: cgroups.of_process(pid) == scope.path, "it has joined")
    try:
        yield group, pid
    finally:
        scope.stop()
        os.waitpid(pid, 0)


def test_a_scope_has_the_limits_and_keeps_them(scope: Scope) -> None:
    with started(scope) as (group, pid):
        assert scope.path == f"insulatest.slice/insulatest-a.slice/{scope.unit}"
        until(lambda: group.processes() == [pid], "what held it has gone")
        for name, value in (("ActiveState", "active"), ("Delegate", "yes"), ("TasksMax", "20"), ("CPUWeight", "59")):
            assert show(scope.unit, name) == value
        before = group.values()
        assert (before["memory.max"], before["memory.swap.max"]) == (str(64 * MIB), "0")
        assert (before["cpu.max"], before["pids.max"]) == ("20000 100000", "20")
        reload()
        after = group.values()
        assert {name: after[name] for name in before if "current" not in name} == {
            name: value for name, value in before.items() if "current" not in name
        }
        fd = os.open(group.directory("") or "", os.O_RDONLY)
        program = ebpf_load.attached(fd, ebpf_load.CGROUP_DEVICE, NAME)
        assert program is not None
        os.close(program)
        os.close(fd)


def test_a_change_outlives_a_reload(scope: Scope) -> None:
    with started(scope) as (group, _):
        change = {"memory": {"limit": 128 * MIB, "swap": 128 * MIB}, "pids": {"limit": -1}}
        scope.update(change)
        group.update(change)
        reload()
        assert (group.values()["memory.max"], group.values()["pids.max"]) == (str(128 * MIB), "max")


def test_a_frozen_scope_is_stopped(scope: Scope) -> None:
    with started(scope) as (group, pid):
        group.freeze()
        group.kill()
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        until(lambda: not group.exists(), "systemd has removed it")


def test_what_fails_after_the_start_leaves_no_scope(scope: Scope) -> None:
    with pytest.raises(ZeroDivisionError), scope.held(RESOURCES):
        assert Cgroup(scope.path).exists()
        _ = 1 / 0
    until(lambda: not Cgroup(scope.path).exists(), "systemd has removed it")
    assert show(scope.unit, "LoadState") == "not-found"
    with started(scope) as (group, _):  # the name is free again
        assert group.exists()


def test_a_name_that_is_taken(scope: Scope) -> None:
    with started(scope), pytest.raises(Failed, match=r"already|exists"):
        scope.start(os.getpid(), {})


def test_a_process_that_is_gone(scope: Scope) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(Failed):
        scope.start(pid, {})
