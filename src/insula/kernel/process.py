"""Processes, named so that a name never comes to mean another process.

A PID is reused after its process is gone. A PID together with the process's start time (field 22 of
proc_pid_stat(5), in clock ticks since boot) is not, and a pidfd (pidfd_open(2)) holds on to one process for good.
So what is written to disk is (pid, start time), and what is signalled is a pidfd opened and checked against it.

In a PID namespace (pid_namespaces(7)) a process has one number in every namespace from its own up to the
host's; the `NSpid` line of /proc/PID/status lists them, outermost first.
"""

from __future__ import annotations

import errno
import fcntl
import os

from insula.kernel import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    IdMap = Sequence[tuple[int, int, int]]
    """Lines of a uid_map or gid_map: first ID inside, first ID outside, how many."""


def start_time(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot; None if there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def open_process(pid: int, started: int | None) -> int:
    """A pidfd of the process that is (pid, start time); ProcessLookupError if that one is gone."""
    pidfd = os.pidfd_open(pid)
    # checked after opening: if the times match now, the descriptor can't be of a later process
    if started is None or start_time(pid) != started:
        os.close(pidfd)
        raise ProcessLookupError(3, "the process is gone", str(pid))
    return pidfd


def is_alive(pid: int, started: int | None) -> bool:
    """Whether a thread of the process that is (pid, start time) still runs.

    A process whose main thread has exited is shown in state Z for as long as its other threads run, as if it were a
    zombie. Only the number of threads (field 20 of proc_pid_stat(5)) tells the two apart: a real zombie has one.
    """
    fields = _stat(pid)
    return fields is not None and started is not None and int(fields[19]) == started and not _is_dead(fields)


def _stat(path: int | str) -> list[bytes] | None:
    """The fields of proc_pid_stat(5) from the third, the state, on; None if there is no such process or thread."""
    try:
        with open(f"/proc/{path}/stat", "rb") as file:
            # the command, field 2, is in parentheses and may hold any byte: count from the last one
            return file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _is_dead(fields: list[bytes]) -> bool:
    return fields[0] == b"X" or (fields[0] == b"Z" and int(fields[17]) <= 1)


def _running_thread(pid: int) -> int | None:
    """A thread of the process that has not exited: the main one if possible. None if there is none.

    A thread that has exited has no namespaces, no root and no descriptors any more.
    """
    try:
        threads = sorted((int(name) for name in os.listdir(f"/proc/{pid}/task")), key=lambda thread: thread != pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    for thread in threads:
        fields = _stat(f"{pid}/task/{thread}")
        if fields and fields[0] not in (b"Z", b"X"):
            return thread
    return None


def directory(pid: int) -> str:
    """Where /proc shows root, mounts and namespaces of the process, also if its main thread has exited."""
    fields = _stat(pid)
    if fields and fields[0] == b"Z" and (thread := _running_thread(pid)):
        return f"/proc/{pid}/task/{thread}"
    return f"/proc/{pid}"


def open_namespace(pid: int, started: int | None, kind: str) -> int:
    """A descriptor of a namespace (`net`, `mnt`, `user`, …) of the process that is (pid, start time)."""
    pidfd = open_process(pid, started)
    try:
        fd = os.open(f"{directory(pid)}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        if not is_alive(pid, started):
            os.close(fd)
            raise ProcessLookupError(3, "the process is gone", str(pid))
        return fd
    finally:
        os.close(pidfd)


def has_namespaces(pid: int, started: int | None) -> bool:
    """Whether the process that is (pid, start time) lives and is not on its way out: it gives them up first."""
    try:
        os.close(open_namespace(pid, started, "net"))
        return True
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last while it loses its memory
        return False


_PIDFD_THREAD = os.O_EXCL


def open_to_join(pid: int, started: int | None) -> int:
    """A pidfd by which setns(2) joins the namespaces of the process that is (pid, start time).

    If its main thread has exited that is one of another thread (PIDFD_THREAD, Linux 6.9; ENOTSUP before).
    """
    pidfd = open_process(pid, started)
    fields = _stat(pid)
    if fields is None or fields[0] != b"Z":
        return pidfd
    try:
        thread = _running_thread(pid)
        if thread is None:
            raise ProcessLookupError(3, "the process is gone", str(pid))
        try:
            found = os.pidfd_open(thread, _PIDFD_THREAD)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            text = "the main thread of its first process has exited, and this kernel joins by that one only"
            raise OSError(errno.ENOTSUP, text) from None
        if not is_alive(pid, started):
            os.close(found)
            raise ProcessLookupError(3, "the process is gone", str(pid))
        return found
    finally:
        os.close(pidfd)


def zombie_status(pid: int) -> int:
    """The status, as of waitpid(2), of a child that has ended and is not reaped yet: the last field of its stat."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[49])


def status_of_dead(pid: int) -> int:
    """The status, as of waitpid(2), of a child that has ended; it stays to be reaped."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:  # a process traces it, and has the first word (ptrace(2))
        return zombie_status(pid)
    if ended.si_code == os.CLD_EXITED:
        return ended.si_status << 8
    return ended.si_status | (0x80 if ended.si_code == os.CLD_DUMPED else 0)


_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3


def exit_status(pidfd: int) -> int | None:
    """The status, as of waitpid(2), of a process that has ended and was reaped by somebody else.

    PIDFD_GET_INFO with PIDFD_INFO_EXIT, since Linux 6.15; None before that, or while nobody has reaped it.
    """
    info = bytearray(64)
    info[0] = _PIDFD_INFO_EXIT
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, status = int.from_bytes(info[:8], "little"), int.from_bytes(info[60:64], "little", signed=True)
    return status if mask & _PIDFD_INFO_EXIT else None


class Process:
    """One process as /proc shows it. `pids` are its numbers from the host's namespace inward."""

    __slots__ = ("command", "parent", "pid", "pids", "state", "uid")

    def __init__(self, *, pid: int, pids: list[int], parent: int, uid: int, state: str, command: str) -> None:
        self.pid = pid
        self.pids = pids
        self.parent = parent
        self.uid = uid
        self.state = state
        self.command = command


def read(pid: int) -> Process | None:
    """What /proc says of `pid`; None if it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        with open(f"/proc/{pid}/cmdline", "rb") as raw:
            command = raw.read(4096).rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(
        pid=pid,
        pids=[int(p) for p in status.get("NSpid", str(pid)).split()],
        parent=int(status["PPid"]),
        uid=int(status["Uid"].split()[0]),
        state=status["State"][:1],
        command=command or f"[{status['Name']}]",
    )


def cpu_time(pid: int) -> float:
    """Seconds of processor time that `pid` has used with all its threads (proc_pid_stat(5)); 0 if it is gone."""
    fields = _stat(pid)
    if fields is None:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def user_namespace(uids: IdMap, gids: IdMap) -> int:
    """A descriptor of a new user namespace with these mappings.

    It lives as long as the descriptor, and serves to map mounts (MOUNT_ATTR_IDMAP). Needs a single thread.
    """
    release, hold = os.pipe()
    pid, pidfd = syscalls.clone3(syscalls.CLONE_NEWUSER)
    if pid == 0:
        os.close(hold)
        os.read(release, 1)
        os._exit(0)
    try:
        map_ids(pid, uids, gids)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for fd in (release, hold, pidfd):
            os.close(fd)
        os.waitpid(pid, 0)


def map_ids(pid: int, uids: IdMap, gids: IdMap) -> None:
    """Write the uid_map and gid_map (user_namespaces(7)) of a process whose user namespace has none yet.

    Each in one write(2), as the kernel wants it. Who may not map groups must give up setgroups(2) for it.
    """
    for name, lines in (("uid_map", uids), ("gid_map", gids)):
        text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in lines)
        try:
            _write(f"/proc/{pid}/{name}", text)
        except PermissionError:
            if name == "uid_map":
                raise
            _write(f"/proc/{pid}/setgroups", "deny")
            _write(f"/proc/{pid}/gid_map", text)


def set_oom_score(pid: int, score: int) -> None:
    """How soon the kernel kills the process for want of memory: oom_score_adj (proc(5)), -1000 to 1000."""
    _write(f"/proc/{pid}/oom_score_adj", str(score))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
