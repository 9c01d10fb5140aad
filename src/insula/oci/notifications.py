"""sd_notify(3) for containers: tells a supervisor that has set NOTIFY_SOCKET when the container is ready.

The container gets a socket of its own instead of the supervisor's, made by `insula.container.create.sd_notify`. Only
the line READY=1 is recognized in its messages, once. The messages to the supervisor are made here: READY=1, and MAINPID
with the PID of the process to watch, on the host. Everything else is dropped, descriptors too.

    run            reads in a thread, while it waits for the container; MAINPID is its own PID
    run --detach,  read until the container is ready or its first process has ended, as runc and crun do; MAINPID is
    start          that process. A signal ends the wait; the supervisor decides how long it may take
"""

from __future__ import annotations

import os
import select
import struct
import time

from insula.container.create.sd_notify import NAME
from insula.model.cpython import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_DIRECTORY = "/run/notify"
_OF_SYSTEMD = "/run/systemd/"
_LONGEST = 4096  # bytes of a datagram that are read
_PAUSE = 0.01  # seconds after a datagram without READY=1, so that endless messages cost little
_PATIENCE = 30.0  # seconds that a supervisor has to receive, as in runc and crun


def prepare(config: dict[str, Any]) -> str:
    """Put NOTIFY_SOCKET into the environment of `config`'s process; returns the directory of that socket inside.

    The directory has the path of the supervisor's socket, as in crun. That of systemd's own is left free, because a
    systemd inside makes its socket there; and an abstract one has no path. For these it is /run/notify, as in runc.
    """
    path = os.path.normpath(os.environ["NOTIFY_SOCKET"])
    if not path.startswith("/") or path.strip("/") == "" or path.startswith(_OF_SYSTEMD):
        path = _DIRECTORY
    path = "/" + path.lstrip("/")
    kept = [each for each in config["process"].get("env") or () if not each.startswith("NOTIFY_SOCKET=")]
    config["process"]["env"] = [*kept, f"NOTIFY_SOCKET={path}/{NAME}"]
    return path


def forward(fd: int, pidfd: int, main: int, warn: Callable[[str], None]) -> None:
    """Read the container's socket `fd` until it says READY=1, then tell the supervisor. `fd` is closed.

    `main` is sent as MAINPID. It also returns when the process of `pidfd` has ended. Errors are warnings, since the
    container runs.
    """
    inside = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, 0, fd)
    try:
        if _is_ready(inside, pidfd):
            _tell(f"READY=1\nMAINPID={main}\n".encode())
    except OSError as error:
        warn(f"NOTIFY_SOCKET: {error.strerror or error}: that the container is ready could not be told")
    finally:
        inside.close()


def forward_beside(fd: int, pidfd: int, warn: Callable[[str], None]) -> None:
    """`forward` in a thread that ends with this process, which is the one to watch. All signals must be blocked."""
    import threading

    threading.Thread(target=forward, args=(fd, pidfd, os.getpid(), warn), daemon=True).start()


def _is_ready(inside: socket.socket, pidfd: int) -> bool:
    """Whether READY=1 comes before the process ends."""
    inside.setblocking(False)
    poll = select.poll()
    poll.register(inside.fileno(), select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    while True:
        found = dict(poll.poll())
        if inside.fileno() not in found:
            return False
        try:
            data = inside.recv(_LONGEST)
        except BlockingIOError:
            continue
        if b"READY=1" in data.split(b"\n"):
            return True
        time.sleep(_PAUSE)


def _tell(message: bytes) -> None:
    """Send `message` to the supervisor, and wait until it was received (sd_notify_barrier(3)).

    The sender is looked up when the message is received; that fails for a process that has ended by then.
    """
    address = os.environ["NOTIFY_SOCKET"]
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    reads, writes = os.pipe()
    try:
        sock.settimeout(_PATIENCE)
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(message)
        sock.sendmsg([b"BARRIER=1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", writes))])
        os.close(writes)
        writes = -1
        select.select([reads], [], [], _PATIENCE)
    finally:
        for fd in (reads, writes):
            if fd >= 0:
                os.close(fd)
        sock.close()
