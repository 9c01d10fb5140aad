"""`insula.kernel.process` about processes of this host, among them one whose main thread has exited."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import process
from tests.forked import forked
from tests.support import elf
from tests.support.descriptors import descriptors, opened_since
from tests.support.wait import until


@pytest.fixture
def leader_gone(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    if platform.machine() != elf.ONLY:
        pytest.skip(f"the program is machine code for {elf.ONLY}")
    program = tmp_path / "program"
    program.write_bytes(elf.leader_gone())
    program.chmod(0o755)
    child = subprocess.Popen([program])
    try:
        until(lambda: state(child.pid) == "Z", "its main thread has exited")
        yield child
    finally:
        child.kill()
        child.wait()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_lives_as_long_as_one_of_its_threads(leader_gone: subprocess.Popen[bytes]) -> None:
    pid, started = leader_gone.pid, process.start_time(leader_gone.pid)
    assert started
    assert process.is_alive(pid, started)
    assert not process.is_alive(pid, started + 1), "another process of that number"
    leader_gone.kill()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not reaped
    assert state(pid) == "Z"
    assert not process.is_alive(pid, started)
    leader_gone.wait()
    assert not process.is_alive(pid, started)


def test_its_namespaces_are_those_of_a_thread_that_runs(leader_gone: subprocess.Popen[bytes]) -> None:
    pid, started = leader_gone.pid, process.start_time(leader_gone.pid)
    with pytest.raises(FileNotFoundError):
        os.stat(f"/proc/{pid}/ns/net")
    fd = process.open_namespace(pid, started, "net")
    assert os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/net"))
    os.close(fd)
    assert os.path.samestat(os.stat(f"{process.directory(pid)}/root"), os.stat("/"))
    assert process.directory(os.getpid()) == f"/proc/{os.getpid()}"


def test_a_process_that_has_ended_cannot_be_opened() -> None:
    child = subprocess.Popen(["true"])
    started = process.start_time(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.is_alive(child.pid, started)
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        process.open_namespace(child.pid, started, "net")
    child.wait()
    for opening in (process.open_process, process.open_to_join):
        with pytest.raises(ProcessLookupError):
            opening(child.pid, started)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "1000"])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def pid_of(pidfd: int) -> int:
    text = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pid:")))


def test_a_process_is_opened_by_pid_and_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    pid, started = sleeper.pid, process.start_time(sleeper.pid)
    assert started
    before = descriptors()
    for opening in (process.open_process, process.open_to_join):
        pidfd = opening(pid, started)
        assert pid_of(pidfd) == pid
        os.close(pidfd)
        for other in (None, started - 1, started + 1):
            with pytest.raises(ProcessLookupError):
                opening(pid, other)
    for other in (None, started + 1):
        assert not process.is_alive(pid, other)
        assert not process.has_namespaces(pid, other)
        with pytest.raises(ProcessLookupError):
            process.open_namespace(pid, other, "net")
    assert process.is_alive(pid, started) and process.has_namespaces(pid, started), "the positive control"
    assert not opened_since(before), "no descriptor is left"
    sleeper.kill()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not process.has_namespaces(pid, started), "it has ended, and is not reaped"


@pytest.mark.parametrize("name", ["x) Z 9 (y", "a) X (b", ")", "((("])
def test_a_name_that_looks_like_a_state_deceives_nobody(tmp_path: Path, name: str) -> None:
    """A process chooses what is in field 2 of proc_pid_stat(5): any bytes but NUL."""
    program = tmp_path / name
    shutil.copy("/bin/sleep", program)
    children = _, odd, _ = [subprocess.Popen([file, "1000"]) for file in ("sleep", program, "sleep")]
    try:
        first, started, last = (process.start_time(child.pid) for child in children)
        assert first and started and last and first <= started <= last
        assert process.is_alive(odd.pid, started)
        until(lambda: (shown := process.read(odd.pid)) and shown.command == f"{program} 1000", "it runs its program")
        shown = process.read(odd.pid)
        assert shown is not None and shown.state in "RSD"
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_join_by_a_thread_that_still_runs(leader_gone: subprocess.Popen[bytes]) -> None:
    pid, started = leader_gone.pid, process.start_time(leader_gone.pid)
    assert process.has_namespaces(pid, started)
    try:
        pidfd = process.open_to_join(pid, started)
    except OSError as error:
        assert error.errno == errno.ENOTSUP, "before Linux 6.9"
        return
    thread = pid_of(pidfd)
    os.close(pidfd)
    assert thread != pid and str(thread) in os.listdir(f"/proc/{pid}/task")
    assert process.directory(pid) == f"/proc/{pid}/task/{thread}"


@pytest.mark.parametrize("script", ["exit 0", "exit 3", "exit 255", "kill -KILL $$", "kill -TERM $$", "kill -64 $$"])
def test_the_status_of_a_child_is_that_of_waitpid(script: str) -> None:
    child = subprocess.Popen(["bash", "-c", script])
    pidfd = os.pidfd_open(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = [process.status_of_dead(child.pid), process.zombie_status(child.pid), process.status_of_dead(child.pid)]
    assert process.exit_status(pidfd) is None, "nobody has reaped it"
    _, status = os.waitpid(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert found == [status] * 3
    afterwards = process.exit_status(pidfd)
    os.close(pidfd)
    if tuple(map(int, platform.release().split(".")[:2])) >= (6, 15):
        assert afterwards == status
    else:
        assert afterwards in (None, status)


def test_a_core_dump_is_a_part_of_the_status(tmp_path: Path) -> None:
    child = subprocess.Popen(["bash", "-c", "ulimit -c unlimited; kill -ABRT $$"], cwd=tmp_path)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = process.status_of_dead(child.pid)
    _, status = os.waitpid(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert found == status and os.WTERMSIG(found) == signal.SIGABRT
    assert os.WCOREDUMP(found) == os.WCOREDUMP(status)


def test_a_process_as_proc_shows_it(sleeper: subprocess.Popen[bytes]) -> None:
    shown = process.read(sleeper.pid)
    assert shown is not None
    assert (shown.pid, shown.parent, shown.uid) == (sleeper.pid, os.getpid(), os.getuid())
    assert shown.pids[0] == sleeper.pid and all(number > 0 for number in shown.pids)
    until(lambda: state(sleeper.pid) == "S", "it sleeps")
    again = process.read(sleeper.pid)
    assert again is not None and (again.state, again.command) == ("S", "sleep 1000")
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    dead = process.read(sleeper.pid)
    assert dead is not None and (dead.state, dead.command) == ("Z", "[sleep]")
    sleeper.wait()
    assert process.read(sleeper.pid) is None and process.start_time(sleeper.pid) is None


def test_processor_time_is_that_of_user_and_kernel(sleeper: subprocess.Popen[bytes]) -> None:
    while os.times().user < 0.1 or os.times().system < 0.1:
        os.stat("/proc/self/status")
        sum(range(1000))
    before, found, after = os.times(), process.cpu_time(os.getpid()), os.times()
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert before.user + before.system - 2 * tick <= found <= after.user + after.system + 2 * tick
    sleeper.kill()
    sleeper.wait()
    assert process.cpu_time(sleeper.pid) == 0.0


def test_the_score_by_which_the_kernel_chooses(sleeper: subprocess.Popen[bytes]) -> None:
    for score in (500, 1000):
        process.set_oom_score(sleeper.pid, score)
        assert Path(f"/proc/{sleeper.pid}/oom_score_adj").read_text() == f"{score}\n"


UIDS, GIDS = [(0, 100_000, 1000), (5000, 300_000, 7)], [(0, 200_000, 65536)]


@pytest.mark.skipif(os.getuid() != 0, reason="only root maps whatever IDs it likes")
def test_a_user_namespace_lives_as_long_as_its_descriptor() -> None:
    def child() -> tuple[list[str], list[int], list[int]]:
        before = descriptors()
        fd = process.user_namespace(UIDS, GIDS)
        opened = [number for number, *_ in opened_since(before)]
        inside = ["nsenter", f"--user=/proc/self/fd/{fd}", "cat", "/proc/self/uid_map", "/proc/self/gid_map"]
        shown = subprocess.run(inside, pass_fds=[fd], stdout=subprocess.PIPE, text=True, check=True).stdout
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        return [" ".join(line.split()) for line in shown.splitlines()], opened, [fd]

    lines, opened, own = forked(child)
    assert lines == ["0 100000 1000", "5000 300000 7", "0 200000 65536"]
    assert opened == own, "no other descriptor is left, and no child"


def test_without_the_right_to_map_groups_setgroups_is_denied() -> None:
    """user_namespaces(7): one ID of one's own, and only after "deny" was written to /proc/PID/setgroups."""

    def child() -> tuple[str, ...]:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        uid, gid = os.getuid(), os.getgid()
        made = subprocess.Popen(["unshare", "--user", "sleep", "1000"], stderr=subprocess.DEVNULL)
        try:
            here = os.readlink("/proc/self/ns/user")
            until(lambda: made.poll() is not None or os.readlink(f"/proc/{made.pid}/ns/user") != here, "it is made")
            if made.returncode is not None:
                return ()
            with pytest.raises(PermissionError):
                process.map_ids(made.pid, [(0, 0, 1)], [(0, gid, 1)])
            untouched = [Path(f"/proc/{made.pid}/{name}").read_text() for name in ("gid_map", "setgroups")]
            assert untouched == ["", "allow\n"], "that it may not map users has nothing to do with groups"
            process.map_ids(made.pid, [(0, uid, 1)], [(7, gid, 1)])
            files = [Path(f"/proc/{made.pid}/{name}").read_text() for name in ("uid_map", "gid_map", "setgroups")]
            return tuple(" ".join(text.split()) for text in files)
        finally:
            made.kill()
            made.wait()

    found = forked(child)
    if not found:
        pytest.skip("this host lets nobody but root make user namespaces")
    assert found[2] == "deny"
    assert found[0].split()[0] == "0" and found[0].split()[2] == "1" and found[1].split()[0] == "7"
