"""Device rules: access of a process to real device nodes, with both versions.

On a hybrid host version 2 is tried in the tree beside version 1: programs take no controller.
"""

from __future__ import annotations

import errno
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from insula.kernel import cgroups
from insula.kernel.cgroups import Cgroup, device_list
from insula.kernel.cgroups.device_program import NAME, compile_rules
from insula.kernel.ebpf import load as ebpf_load
from tests.forked import errno_of
from tests.support import groups
from tests.support.groups import inside
from tests.support.machine import Run
from tests.unit.test_cgroups_devices import rules as any_rules
from tests.unit.test_cgroups_devices import wanted

TREES = groups.trees()
DENY_ALL = {"allow": False, "access": "rwm"}
NULL = {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
MAJOR, MINORS = 1, (3, 7)  # null and full: opening them does nothing


@pytest.fixture(params=TREES)
def group(run_: Run, request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    with groups.made(run_.name, TREES[request.param]) as group:
        yield group


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """null and full in a directory of the test's own."""
    for minor in MINORS:
        os.mknod(tmp_path / str(minor), stat.S_IFCHR | 0o666, os.makedev(MAJOR, minor))
    return tmp_path


def attempt(nodes: Path, minor: int, access: str) -> bool:
    """Whether the calling process may: open for reading, writing or both, or make a node."""
    if access == "m":
        error = errno_of(lambda: os.mknod(nodes / "new", stat.S_IFCHR, os.makedev(MAJOR, minor)))
        if not error:
            (nodes / "new").unlink()
    else:
        flags = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}[access]
        error = errno_of(lambda: os.close(os.open(nodes / str(minor), flags)))
    assert error in (0, errno.EPERM), os.strerror(error)
    return error == 0


ATTEMPTS = [(minor, access) for minor in MINORS for access in ("r", "w", "rw", "m")]


def all_attempts(nodes: Path) -> dict[tuple[int, str], bool]:
    return {(minor, access): attempt(nodes, minor, access) for minor, access in ATTEMPTS}


@contextmanager
def member(group: Cgroup, function: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """A process that stays in the group: each call is one of `function` there."""
    files = group.open()
    ask, answer = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ask[1])
            cgroups.join(files)
            os.write(answer[1], pickle.dumps("joined"))
            while os.read(ask[0], 1):
                os.write(answer[1], pickle.dumps(function()))
        finally:
            os._exit(0)
    os.close(ask[0])
    os.close(answer[1])

    def call() -> Any:
        os.write(ask[1], b".")
        return pickle.loads(os.read(answer[0], 65536))

    try:
        assert pickle.loads(os.read(answer[0], 65536)) == "joined"
        yield call
    finally:
        for fd in (*files, ask[1], answer[0]):
            os.close(fd)
        os.waitpid(pid, 0)


def test_devices_that_are_not_allowed_are_refused(group: Cgroup, nodes: Path) -> None:
    assert all(inside(group, lambda: all_attempts(nodes)).values())  # the control
    group.limit({"devices": [DENY_ALL, NULL]})
    found = inside(group, lambda: all_attempts(nodes))
    assert {minor for (minor, _), allowed in found.items() if allowed} == {3}
    assert all(allowed for (minor, _), allowed in found.items() if minor == 3)


def test_each_access_is_its_own(group: Cgroup, nodes: Path) -> None:
    group.limit({"devices": [DENY_ALL, {**NULL, "access": "r"}, {**NULL, "minor": 7, "access": "wm"}]})
    found = inside(group, lambda: all_attempts(nodes))
    assert {attempt for attempt, allowed in found.items() if allowed} == {(3, "r"), (7, "w"), (7, "m")}


def test_rules_change_for_running_processes_and_groups_below(group: Cgroup, nodes: Path) -> None:
    """Version 1 refuses to reset a list while there are groups below, such as those that a container makes."""
    group.limit({"devices": [DENY_ALL, NULL]})
    below = Cgroup(f"{group.path}/below", group.tree)
    with ExitStack() as stack:
        here = stack.enter_context(member(group, lambda: all_attempts(nodes)))
        below.create()
        there = stack.enter_context(member(below, lambda: all_attempts(nodes)))
        assert here()[3, "rw"] and there()[3, "rw"] and not here()[7, "r"]
        group.update({"devices": [DENY_ALL, {**NULL, "minor": 7, "access": "rw"}]})
        assert here()[7, "rw"] and not here()[7, "m"] and not here()[3, "r"]
        assert not there()[3, "r"]
        group.update({"devices": [DENY_ALL]})
        assert not any(here().values()) and not any(there().values())


def test_a_group_below_gets_no_more_than_its_parent_has(group: Cgroup, nodes: Path) -> None:
    group.limit({"devices": [DENY_ALL, NULL]})
    below = Cgroup(f"{group.path}/below", group.tree)
    below.create()
    allow_all = {"devices": [{"allow": True, "access": "rwm"}]}
    if group.tree.unified:  # where it may ask, and the parent's program answers too
        below.limit(allow_all)
    else:
        with pytest.raises(OSError, match=r"linux\.resources\.devices: allow a"):
            below.limit(allow_all)
        with pytest.raises(OSError, match=r"linux\.resources\.devices: allow c 1:7 rwm"):
            below.limit({"devices": [DENY_ALL, NULL, {**NULL, "minor": 7}]})
    found = inside(below, lambda: all_attempts(nodes))
    assert found[3, "rw"] and not found[7, "r"]


def test_a_group_whose_parent_has_the_list_needs_no_write(run_: Run, nodes: Path) -> None:
    """The engine's way on version 1: a tenant's group has the rules of its instances."""
    wanted_rules = {"devices": [DENY_ALL, NULL]}
    with groups.made(run_.name) as parent:
        if parent.tree.unified:
            pytest.skip("version 1 only: a group of version 2 begins without a program")
        parent.limit(wanted_rules)
        child = Cgroup(f"{parent.path}/child")
        child.create()
        in_force = Path(child.directory("devices") or "", "devices.list").read_text().strip()
        assert device_list.changes(in_force, device_list.normalise(wanted_rules["devices"])) == []
        child.limit(wanted_rules)
        found = inside(child, lambda: all_attempts(nodes))
        assert found[3, "rw"] and not found[7, "r"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rules=any_rules)
def test_the_kernel_decides_as_the_rules_say(rules: list[dict[str, Any]], group: Cgroup, nodes: Path) -> None:
    """Any list of rules after any other, on a process that runs."""
    try:
        device_list.normalise(rules)
    except OSError:
        if not group.tree.unified:
            return
    if not rules:
        return
    with member(group, lambda: all_attempts(nodes)) as ask:
        group.update({"devices": rules})
        found = ask()
    for (minor, access), allowed in found.items():
        assert allowed == wanted(rules, ("c", MAJOR, minor), set(access)), (minor, access)


# -- programs ---------------------------------------------------------------------------------------------------------


def programs(group: Cgroup) -> int:
    """How many of ours are attached."""
    fd = os.open(group.directory("") or "", os.O_RDONLY)
    count = 0
    try:
        while (found := ebpf_load.attached(fd, ebpf_load.CGROUP_DEVICE, NAME)) is not None:
            count += 1
            ebpf_load.detach(fd, found, ebpf_load.CGROUP_DEVICE)
            os.close(found)
    finally:
        os.close(fd)
    return count


@pytest.fixture
def second(run_: Run) -> Iterator[Cgroup]:
    tree = TREES.get("v2") or TREES.get("v2 beside v1")
    if tree is None:
        pytest.skip("this host has no version 2 tree")
    with groups.made(run_.name, tree) as group:
        yield group


def test_a_program_takes_the_place_of_another(second: Cgroup) -> None:
    for minor in (3, 7, 7, 3):
        second.limit({"devices": [DENY_ALL, {**NULL, "minor": minor}]})
    assert programs(second) == 1


def test_other_programs_of_the_group_stay(second: Cgroup, nodes: Path) -> None:
    """systemd has its own; all must agree."""
    fd = os.open(second.directory("") or "", os.O_RDONLY)
    theirs = ebpf_load.load(compile_rules([DENY_ALL, NULL]), ebpf_load.PROG_TYPE_CGROUP_DEVICE, "theirs")
    try:
        ebpf_load.attach(fd, theirs, ebpf_load.CGROUP_DEVICE)
        second.limit({"devices": [{"allow": True, "access": "rwm"}]})
        found = inside(second, lambda: all_attempts(nodes))
        assert found[3, "rw"] and not found[7, "r"]
        assert programs(second) == 1
        assert ebpf_load.attached(fd, ebpf_load.CGROUP_DEVICE, "theirs")
    finally:
        os.close(theirs)
        os.close(fd)


def test_a_program_that_the_verifier_refuses_is_explained() -> None:
    with pytest.raises(OSError, match=r"R0 !read_ok"):
        ebpf_load.load(b"\x95" + bytes(7), ebpf_load.PROG_TYPE_CGROUP_DEVICE, "bad")


def test_a_list_of_hundreds_of_rules_is_no_problem(second: Cgroup, nodes: Path) -> None:
    many = [{"allow": number % 2 == 0, "type": "b", "major": 200, "minor": number} for number in range(300)]
    second.limit({"devices": [DENY_ALL, NULL, *many]})
    found = inside(second, lambda: all_attempts(nodes))
    assert found[3, "rw"] and not found[7, "r"]
