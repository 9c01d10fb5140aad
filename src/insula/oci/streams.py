"""The standard streams of a container that `insula-oci` makes, and its signals.

There is no monitor here: a container inherits the streams of the caller, such as pipes or files.
Only a terminal is made, in the container's own devpts. Its other end is sent to the listener at --console-socket,
as conmon and containerd's shim do; or it is relayed here, by `run` and `exec` that wait in the foreground.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from insula.model.cpython import socket
from insula.model.errors import Failed, Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.kernel.rollback import Rollback
    from insula.oci.options import VerbArguments

_NULL_DEVICE = os.makedev(1, 3)
_UNSUITABLE = (errno.EINVAL, errno.EPERM, errno.EROFS)


class Receiver:
    """A connection to the unix socket of --console-socket or --pidfd-socket, to which a descriptor is sent.

    It is made before anything else, and closed by the caller. Raises Failed if no process listens at `path`.
    """

    def __init__(self, path: str, option: str = "--console-socket") -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.connect(path)
        except OSError as error:
            self._sock.close()
            raise Failed(
                f"{option} {path}: {error.strerror}", "start the program that listens on this socket"
            ) from None

    def send(self, fd: int, name: bytes = b"/dev/ptmx") -> None:
        """Send a descriptor; `name`, sent along, tells the receiver what it is."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        self._sock.sendmsg([name], rights)

    def close(self) -> None:
        self._sock.close()


def open_console(arguments: VerbArguments, terminal: bool, detached: bool) -> Receiver | None:
    """Connect to --console-socket, if it is given. Raises Invalid if it is needless, or needed and not given."""
    if arguments.console_socket and not terminal:
        raise Invalid("--console-socket: the process has no terminal", "set process.terminal, or leave it out")
    if terminal and detached and not arguments.console_socket:
        raise Invalid(
            "process.terminal: a detached container with a terminal needs a console socket", "use --console-socket"
        )
    return Receiver(arguments.console_socket) if arguments.console_socket else None


def hand_over(master: int, console: Receiver | None) -> int:
    """Send the master of a terminal to --console-socket, and close it here: -1; without one it is returned."""
    if console is None:
        return master
    try:
        console.send(master)
    finally:
        os.close(master)
    return -1


def open_pidfd_socket(arguments: VerbArguments, undo: Rollback) -> Receiver | None:
    """The socket of --pidfd-socket, which `undo` closes."""
    if not arguments.pidfd_socket:
        return None
    receiver = Receiver(arguments.pidfd_socket, "--pidfd-socket")
    undo.callback(receiver.close)
    return receiver


def preserved(arguments: VerbArguments) -> int:
    """How many descriptors from 3 on are passed on: --preserve-fds and those of sd_listen_fds(3).

    From the first one that is not open on, they are not passed, with a warning: the numbers may be ours by now.
    """
    count: int = (arguments.preserve_fds or 0) + listening()
    if not 0 <= count <= 1 << 16:
        raise Invalid(f"there can't be {count} descriptors to preserve", "as in 2")
    for fd in range(3, 3 + count):
        try:
            os.fstat(fd)
        except OSError:
            from insula.oci import log

            log.warning(f"--preserve-fds: descriptor {fd} is not open: {fd - 3} are passed on of {count}", arguments)
            return fd - 3
    return count


def listening() -> int:
    """LISTEN_FDS of our own environment: sockets that systemd opened for us (sd_listen_fds(3)).

    If LISTEN_PID is not our PID they are for another process, and the result is 0.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return 0
    value = os.environ.get("LISTEN_FDS", "")
    return int(value) if value.isdecimal() and len(value) < 5 else 0


def standard(config: dict[str, Any]) -> list[int]:
    """The descriptors for 0, 1 and 2 of the container's process; -1 stands for /dev/null of the container.

    That replaces a /dev/null of the host, which would keep the host's /dev busy and could not be checkpointed.
    """
    own = any(m["destination"].rstrip("/") == "/dev" and m.get("type") == "tmpfs" for m in config.get("mounts") or ())
    return [-1 if own and _is_null_device(os.fstat(fd)) else fd for fd in (0, 1, 2)]


def size_of_terminal() -> dict[str, int] | None:
    """`consoleSize` of the terminal that is our standard input; None if it is none."""
    if not os.isatty(0):
        return None
    size = os.get_terminal_size(0)
    return {"height": size.lines, "width": size.columns}


def give_to(uid: int) -> None:
    """Make `uid` of the host the owner of our standard streams, so that the program can reopen them as /dev/stdout.

    As in runc, /dev/null keeps its owner, because all share it, and so does a file whose owner can't be changed.
    """
    if uid == 0:
        return
    for fd in (0, 1, 2):
        found = os.fstat(fd)
        if found.st_uid == uid or _is_null_device(found):
            continue
        try:
            os.fchown(fd, uid, -1)
        except OSError as error:
            if error.errno not in _UNSUITABLE:
                raise


def _is_null_device(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == _NULL_DEVICE


def fill_standard_streams() -> None:
    """Open /dev/null in place of standard streams that the caller has closed: no other file may get their numbers."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)  # gets the lowest number that is free
            os.set_inheritable(fd, True)


def write_pid(path: str, pid: int) -> None:
    """Write --pid-file, replacing it atomically: a reader never finds half of a number."""
    head, _, name = path.rpartition("/")
    temporary = f"{head}/.{name}" if head or path.startswith("/") else f".{name}"
    with open(temporary, "w") as file:
        file.write(str(pid))
    os.rename(temporary, path)
