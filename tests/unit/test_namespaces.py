"""`container.create.namespaces`: the namespaces that a plan makes and joins, as the new process sees them in /proc."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from insula.container.create import namespaces
from insula.container.create.namespaces import FLAGS, Plan, clone, differing, join, plan
from insula.container.create.steps import StepError
from insula.kernel import capabilities, process, syscalls
from insula.kernel.rollback import Rollback
from tests.forked import forked

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")

FILES = {kind: namespaces.FILES.get(kind, kind) for kind in FLAGS}
MADE = ["user", "pid", "mount", "network", "ipc", "uts"]
"""What clone3(2) makes for the engine's containers."""
BASE = 0x50000000
PR_GET_DUMPABLE = 3
MAPS = [(0, BASE, 1000), (1000, BASE + 5000, 10)]


def links(pid: int | str = "self") -> dict[str, str]:
    """The namespaces of a process. Of the time namespace, that of its children: its own, if it is among these."""
    return {kind: os.readlink(f"/proc/{pid}/ns/{file}") for kind, file in FILES.items()}


def others(pid: int) -> set[str]:
    """The types of namespaces in which `pid` is not where we are."""
    ours = links()
    return {kind for kind, link in links(pid).items() if link != ours[kind]}


def config(*entries: str | tuple[str, str], **more: Any) -> dict[str, Any]:
    """`linux` of a config: types of namespaces to make, or types and paths to join."""
    named = [{"type": e} if isinstance(e, str) else {"type": e[0], "path": e[1]} for e in entries]
    return {"namespaces": named, **more}


def born(asked: Plan, look: Callable[[int], Any]) -> Any:
    """The result of `look` for the PID of a process that was cloned as `asked`. Single-threaded callers only."""
    release, hold = os.pipe()
    pid, pidfd = clone(asked)
    if pid == 0:
        os.close(hold)
        os.read(release, 1)
        os._exit(7)
    try:
        assert process.start_time(pid) is not None
        os.close(os.pidfd_open(pid))
        found = look(pid)
        signal.pidfd_send_signal(pidfd, 0)
        return found
    finally:
        os.close(hold)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7  # it is our own child, and none other is left
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        os.close(release)
        os.close(pidfd)


def cloned(linux_config: dict[str, Any], look: Callable[[int], Any], share: tuple[int, int] | None = None) -> Any:
    """The result for a config, in a process of one thread; no descriptor may be left."""

    def inside() -> Any:
        before = sorted(os.listdir("/proc/self/fd"))
        with Rollback() as undo:
            found = born(plan(linux_config, undo, share), look)
        assert sorted(os.listdir("/proc/self/fd")) == before
        return found

    return forked(inside)


def refusal(linux_config: dict[str, Any]) -> str:
    """Why no process is born; then no child and no descriptor is left."""

    def inside() -> str:
        before = sorted(os.listdir("/proc/self/fd"))
        with Rollback() as undo, pytest.raises(StepError) as error:
            clone(plan(linux_config, undo))
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        assert sorted(os.listdir("/proc/self/fd")) == before
        return str(error.value)

    return forked(inside)


def living(flags: int, maps: list[tuple[int, int, int]] | None = None, owner: int = 0) -> Iterator[int]:
    """A process in new namespaces, until the generator is closed; `owner` makes their user namespace."""
    ours, theirs = os.pipe()
    release, hold = os.pipe()
    between = os.fork()
    if between == 0:
        os.close(ours)
        os.close(hold)
        if owner:
            rights = capabilities.current()
            capabilities.before_setuid(rights)
            os.setresgid(owner, owner, owner)
            os.setresuid(owner, owner, owner)
            capabilities.after_setuid(rights)
        syscalls.unshare(flags)
        pid = os.fork()  # the first in the PID namespace and in the time namespace
        if pid == 0:
            os.read(release, 1)
            os._exit(0)
        os.write(theirs, str(pid).encode())
        os.waitpid(pid, 0)
        os._exit(0)
    os.close(theirs)
    os.close(release)
    try:
        pid = int(os.read(ours, 100))
        if maps:
            process.map_ids(pid, maps, maps[:1])
        yield pid
    finally:
        os.close(ours)
        os.close(hold)
        os.waitpid(between, 0)


@pytest.fixture
def holder() -> Iterator[int]:
    """A process in a namespace of its own of each type but user."""
    yield from living(sum(FLAGS.values()) & ~syscalls.CLONE_NEWUSER)


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process in user, PID and network namespaces that `BASE` made, with `MAPS` of its IDs."""
    yield from living(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNET, MAPS, owner=BASE)


# -- made anew ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MADE)
def test_only_the_requested_namespace_is_made(kind: str) -> None:
    assert cloned(config(kind), others) == {kind}


def test_all_namespaces_are_made_at_once() -> None:
    assert cloned(config(*MADE), others) == set(MADE)


def test_no_namespace_is_made() -> None:
    assert cloned(config(), others) == set()
    assert cloned({}, others) == set()


def test_the_childs_part_is_noted_and_not_made_here() -> None:
    with Rollback() as undo:
        asked = plan(config("cgroup", "uts"), undo)
    assert (asked.cgroup, asked.make, asked.join, asked.offsets) == (True, syscalls.CLONE_NEWUTS, [], None)
    assert (asked.makes(syscalls.CLONE_NEWUTS), asked.makes(syscalls.CLONE_NEWNET)) == (True, False)
    with Rollback() as undo:
        assert not plan(config("uts"), undo).cgroup


def test_clocks_are_shifted_for_the_child_and_not_for_us() -> None:
    offsets = {"monotonic": {"secs": 1000}, "boottime": {"secs": 50, "nanosecs": 5}}

    def look(pid: int) -> Any:
        with open(f"/proc/{pid}/timens_offsets") as file:
            lines = [line.split() for line in file]
        return others(pid), lines

    kinds, lines = cloned(config("time", timeOffsets=offsets), look)
    assert kinds == {"time"}
    assert lines == [["monotonic", "1000", "0"], ["boottime", "50", "5"]]
    kinds, lines = cloned(config("time", "uts"), look)
    assert (kinds, [line[1:] for line in lines]) == ({"time", "uts"}, [["0", "0"], ["0", "0"]])


def test_refused_clock_offsets_are_an_error_and_leave_no_child() -> None:
    refused = refusal(config("time", timeOffsets={"monotonic": {"secs": -(10**9)}}))
    assert refused.startswith("make the time namespace: ")


def test_the_intermediate_process_reports_why_there_is_no_child() -> None:
    clone_fs = 0x200  # which no process may share with another mount namespace (clone(2))
    with Rollback() as undo:
        asked = plan(config("mount", "time"), undo)
    asked.make |= clone_fs

    def inside() -> str:
        with pytest.raises(StepError) as error:
            clone(asked)
        return str(error.value)

    assert forked(inside) == "make the namespaces: clone3: Invalid argument"


# -- joined ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pid", "network", "ipc", "uts", "cgroup", "mount", "time"])
def test_only_the_requested_namespace_is_joined(holder: int, kind: str) -> None:
    path = f"/proc/{holder}/ns/{FILES[kind]}"

    def look(pid: int) -> Any:
        return others(pid), links(pid)[kind]

    assert cloned(config((kind, path)), look) == ({kind}, os.readlink(path))


def test_some_are_joined_and_others_made(holder: int) -> None:
    network, pids = f"/proc/{holder}/ns/net", f"/proc/{holder}/ns/pid"

    def look(pid: int) -> Any:
        found = links(pid)
        return others(pid), found["network"], found["pid"]

    kinds, *joined = cloned(config(("network", network), ("pid", pids), "uts", "ipc"), look)
    assert (kinds, joined) == ({"network", "pid", "uts", "ipc"}, [os.readlink(network), os.readlink(pids)])


def test_it_is_not_dumpable_in_a_foreign_namespace(holder: int) -> None:
    """It is undumpable before it is visible to them: /proc shows such a process as root's, whatever its uid."""

    def look(pid: int) -> int:
        return int(next(line for line in open(f"/proc/{pid}/status") if line.startswith("NSpid")).split()[-1])

    def dumpable(entries: dict[str, Any]) -> int:
        def inside() -> int:
            with Rollback() as undo:
                pid, _ = clone(plan(entries, undo))
            if pid == 0:
                os._exit(syscalls.prctl(PR_GET_DUMPABLE))
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        return forked(inside)

    path = f"/proc/{holder}/ns/pid"
    assert cloned(config(("pid", path)), look) > 1
    assert dumpable(config(("pid", path))) == 0
    assert dumpable(config(("network", f"/proc/{holder}/ns/net"))) == 1  # the control


def test_the_own_namespace_is_not_joined() -> None:
    """To join the user namespace again is refused by the kernel (setns(2))."""
    with Rollback() as undo:
        asked = plan(config(*((kind, f"/proc/self/ns/{file}") for kind, file in FILES.items())), undo)
    assert (asked.join, asked.make) == ([], 0)


def test_a_file_that_is_no_namespace(tmp_path: Any) -> None:
    file = tmp_path / "file"
    file.touch()
    with Rollback() as undo, pytest.raises(OSError, match="it is no network namespace") as error:
        plan(config(("network", str(file))), undo)
    assert (error.value.errno, error.value.filename) == (errno.EINVAL, str(file))


def test_a_namespace_of_the_wrong_type_is_refused(holder: int) -> None:
    refused = refusal(config(("network", f"/proc/{holder}/ns/uts")))
    assert refused == "join the network namespace: setns: Invalid argument"


def test_descriptors_are_closed_and_not_inherited(holder: int) -> None:
    undo = Rollback()
    asked = plan(config(("network", f"/proc/{holder}/ns/net"), ("uts", f"/proc/{holder}/ns/uts")), undo)
    fds = asked.descriptors()
    assert [flag for _, flag in asked.join] == [syscalls.CLONE_NEWNET, syscalls.CLONE_NEWUTS]
    assert [os.get_inheritable(fd) for fd in fds] == [False, False]
    undo.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


# -- users -------------------------------------------------------------------------------------------------------------


def test_the_user_namespace_is_joined_last_and_brings_its_mappings(stranger: int) -> None:
    user, pids = (f"/proc/{stranger}/ns/{file}" for file in ("user", "pid"))

    def read() -> Any:
        with Rollback() as undo:
            asked = plan(config(("user", user), ("pid", pids)), undo)
            return [flag for _, flag in asked.join], list(asked.uids), list(asked.gids), asked.has_user()

    order, uids, gids, has_user = forked(read)
    assert order == [syscalls.CLONE_NEWPID, syscalls.CLONE_NEWUSER]
    assert (uids, gids) == (MAPS, MAPS[:1])
    assert has_user
    assert cloned(config(("user", user), ("pid", pids)), others) == {"user", "pid"}
    given = [{"containerID": 0, "hostID": 5, "size": 6}]
    with Rollback() as undo:
        asked = plan(config("user", uidMappings=given, gidMappings=[]), undo)
    assert (asked.uids, asked.gids, asked.has_user()) == ([(0, 5, 6)], [], True)
    with Rollback() as undo:
        assert not plan(config("pid", ("pid", pids)), undo).has_user()


def test_a_user_namespace_that_may_not_be_joined_is_an_error(stranger: int) -> None:
    def inside() -> str:
        fd = os.open(f"/proc/{stranger}/ns/user", os.O_RDONLY)
        os.setresuid(BASE + 1, BASE + 1, BASE + 1)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # or /proc/self would be root's
        with Rollback() as undo, pytest.raises(OSError, match="can't be joined") as error:
            plan(config(("user", f"/proc/self/fd/{fd}")), undo)
        assert error.value.errno == errno.EPERM
        return str(error.value)

    assert forked(inside)


def test_namespaces_owned_by_the_user_namespace_are_joined_after_it(stranger: int) -> None:
    """The owner of a user namespace on the host has rights over the namespaces in it only after joining it."""

    def joining(user: int, *kinds: str) -> str | set[str]:
        def inside() -> str | set[str]:
            fds = [os.open(f"/proc/{stranger}/ns/{FILES[kind]}", os.O_RDONLY) for kind in kinds]
            before = links()
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            try:
                join([(fd, FLAGS[kind]) for fd, kind in zip(fds, kinds, strict=True)])
            except StepError as error:
                return str(error)
            return {kind for kind, link in links().items() if link != before[kind]}

        return forked(inside)

    assert joining(BASE, "network", "user") == {"network", "user"}
    assert joining(BASE, "user", "network") == {"network", "user"}
    assert joining(BASE, "network") == "join the network namespace: setns: Operation not permitted"
    assert joining(BASE + 1, "network", "user") == "join the user namespace: setns: Operation not permitted"


def test_another_containers_first_process_is_shared(stranger: int) -> None:
    """Its user and PID namespaces are joined, and the rest is made."""
    share = (stranger, process.start_time(stranger) or 0)

    def look(pid: int) -> Any:
        found = links(pid)
        return others(pid), found["user"], found["pid"]

    given = [{"containerID": 0, "hostID": BASE, "size": 1000}]
    asked = config("user", "pid", "uts", uidMappings=given, gidMappings=given)
    theirs = links(stranger)
    assert cloned(asked, look, share) == ({"user", "pid", "uts"}, theirs["user"], theirs["pid"])
    with Rollback() as undo, pytest.raises(ProcessLookupError):
        plan(asked, undo, (stranger, share[1] + 1))


def test_ids_outside() -> None:
    asked = Plan()
    assert asked.outside(5, 6) == (5, 6)
    asked.uids, asked.gids = [(0, 1000, 10), (20, 5000, 2)], [(3, 7000, 1)]
    found = [asked.outside(number, 3) for number in (0, 9, 10, 19, 20, 21, 22)]
    assert found == [(outside, 7000) for outside in (1000, 1009, 65534, 65534, 5000, 5001, 65534)]
    assert [asked.outside(0, gid)[1] for gid in (2, 4)] == [65534, 65534]


# -- to join a process -------------------------------------------------------------------------------------------------


def test_differing_names_the_namespaces_to_join(holder: int) -> None:
    assert differing(os.getpid()) == 0
    assert differing(holder) == sum(FLAGS.values()) & ~syscalls.CLONE_NEWUSER
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    with pytest.raises(ProcessLookupError):
        differing(gone.pid)
