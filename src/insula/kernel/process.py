"""Processes, identified so that an identifier never refers to another process later.

The kernel reuses a PID after its process has been reaped. A PID together with the process's start time (field 22 of
proc_pid_stat(5), in clock ticks since boot) is unique until the next boot, and a pidfd (pidfd_open(2)) refers to one
process as long as it is open. So files record (pid, start time), and signals go through a pidfd that was opened and
then checked against that pair.

A process has one PID in each PID namespace (pid_namespaces(7)) from the host's down to its own. The `NSpid` line of
/proc/PID/status lists them, outermost first: ``NSpid: 4711 1`` is PID 4711 of the host and PID 1 of a container.
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
    """Return the start time of `pid`, in clock ticks since boot; None if there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def open_process(pid: int, started: int | None) -> int:
    """Open a pidfd of the process (pid, start time); ProcessLookupError if it is gone."""
    pidfd = os.pidfd_open(pid)
    # checked after opening: if the times match now, the pidfd can't be of a later process
    if started is None or start_time(pid) != started:
        os.close(pidfd)
        raise ProcessLookupError(3, "the process is gone", str(pid))
    return pidfd


def is_alive(pid: int, started: int | None) -> bool:
    """Whether a thread of the process (pid, start time) still runs.

    A process whose main thread has exited is shown in state Z while its other threads run, as if it were a zombie. The
    number of threads (field 20 of proc_pid_stat(5)) distinguishes them: a zombie has one.
    """
    fields = _stat(pid)
    return fields is not None and started is not None and int(fields[19]) == started and not _is_dead(fields)


def _stat(path: int | str) -> list[bytes] | None:
    """Return the fields of proc_pid_stat(5) from the third (the state) on; None if the process or thread is gone."""
    try:
        with open(f"/proc/{path}/stat", "rb") as file:
            # the command, field 2, is in parentheses and may hold any byte: count from the last one
            return file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _is_dead(fields: list[bytes]) -> bool:
    return fields[0] == b"X" or (fields[0] == b"Z" and int(fields[17]) <= 1)


def _running_thread(pid: int) -> int | None:
    """Return a thread of the process that has not exited, the main one if possible; None if all have exited.

    A thread that has exited has no namespaces, no root directory and no descriptors.
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
    """Return the directory in /proc that has root, mounts and namespaces of the process.

    It is another thread's if the main thread has exited.
    """
    fields = _stat(pid)
    if fields and fields[0] == b"Z" and (thread := _running_thread(pid)):
        return f"/proc/{pid}/task/{thread}"
    return f"/proc/{pid}"


def open_namespace(pid: int, started: int | None, kind: str) -> int:
    """Open a namespace (`net`, `mnt`, `user`, …) of the process (pid, start time); ProcessLookupError if it is gone."""
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
    """Whether the process (pid, start time) is alive and not exiting: an exiting process gives up namespaces first."""
    try:
        os.close(open_namespace(pid, started, "net"))
        return True
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last while its memory is being freed
        return False


_PIDFD_THREAD = os.O_EXCL


def open_to_join(pid: int, started: int | None) -> int:
    """Open a pidfd for setns(2), to join the namespaces of the process (pid, start time).

    If the main thread has exited it is a pidfd of another thread (PIDFD_THREAD, Linux 6.9; ENOTSUP before).
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
            text = "the main thread of its first process has exited, and this kernel can join only through that thread"
            raise OSError(errno.ENOTSUP, text) from None
        if not is_alive(pid, started):
            os.close(found)
            raise ProcessLookupError(3, "the process is gone", str(pid))
        return found
    finally:
        os.close(pidfd)


def zombie_status(pid: int) -> int:
    """Return the waitpid(2) status of a child that has ended and is not reaped yet: the last field of its stat."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[49])


def status_of_dead(pid: int) -> int:
    """Return the waitpid(2) status of a child that has ended, without reaping it."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:  # its tracer must wait for it first (ptrace(2))
        return zombie_status(pid)
    if ended.si_code == os.CLD_EXITED:
        return ended.si_status << 8
    return ended.si_status | (0x80 if ended.si_code == os.CLD_DUMPED else 0)


_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3


def exit_status(pidfd: int) -> int | None:
    """Return the waitpid(2) status of a process that another process has reaped.

    Uses PIDFD_GET_INFO with PIDFD_INFO_EXIT (Linux 6.15). None on older kernels, and while it is not reaped.
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
    """One process as /proc shows it. `pids` are its PIDs from the host's PID namespace inward."""

    __slots__ = ("command", "parent", "pid", "pids", "state", "uid")

    def __init__(self, *, pid: int, pids: list[int], parent: int, uid: int, state: str, command: str) -> None:
        self.pid = pid
        self.pids = pids
        self.parent = parent
        self.uid = uid
        self.state = state
        self.command = command


def read(pid: int) -> Process | None:
    """Read `pid` from /proc; None if it is gone."""
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
    """Return the processor time of all threads of `pid` in seconds (proc_pid_stat(5)); 0 if it is gone."""
    fields = _stat(pid)
    if fields is None:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def user_namespace(uids: IdMap, gids: IdMap) -> int:
    """Make a user namespace with these mappings and return its descriptor, for idmapped mounts (MOUNT_ATTR_IDMAP).

    The namespace lives as long as the descriptor. The caller must have a single thread.
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

    The kernel takes each in one write(2). Without CAP_SETGID a gid_map is accepted only after setgroups(2) was denied.
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
    """Set oom_score_adj (proc(5)), -1000 (never killed when memory runs out) to 1000 (killed first)."""
    _write(f"/proc/{pid}/oom_score_adj", str(score))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
