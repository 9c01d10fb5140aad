"""Messages between the processes of a host: JSON with file descriptors, over unix sockets.

SOCK_SEQPACKET (unix(7)) preserves the boundaries of messages, and SCM_RIGHTS (cmsg(3)) passes file descriptors. The
sockets are in the run directory, which only root can enter.

`insula-oci` loads this too, so the sockets are those of `insula.model.cpython`, of which those of the module `socket`
are a subclass.
"""

from __future__ import annotations

import os
import struct

from insula.model import cpython
from insula.model.cpython import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any, TypeAlias

Message: TypeAlias = "dict[str, Any]"
MAX_MESSAGE = 128 << 10
MAX_DESCRIPTORS = 64
_buffer = memoryview(bytearray(MAX_MESSAGE))  # made once: most messages are a thousandth of what it holds


def pair() -> tuple[cpython.socket.socket, cpython.socket.socket]:
    """Two connected sockets, for a process and its child."""
    return cpython.socket.socketpair(cpython.socket.AF_UNIX, cpython.socket.SOCK_SEQPACKET)


def send(sock: cpython.socket.socket, message: Message, descriptors: list[int] | None = None, flags: int = 0) -> None:
    """Send one message; the descriptors stay open here."""
    data = dumps(message).encode()
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"message of {len(data)} bytes")
    if descriptors:
        rights = struct.pack(f"{len(descriptors)}i", *descriptors)
        sock.sendmsg([data], [(cpython.socket.SOL_SOCKET, cpython.socket.SCM_RIGHTS, rights)], flags)
    else:
        sock.send(data, flags)


def receive(sock: cpython.socket.socket) -> tuple[Message, list[int]] | None:
    """Receive a message and its descriptors; None when the other side is gone."""
    try:
        data, descriptors, flags = _receive(sock)
    except ConnectionResetError:
        # it ended without having read all of ours; this is told once, and before what it had sent
        data, descriptors, flags = _receive(sock)
    if not data or flags & (cpython.socket.MSG_TRUNC | cpython.socket.MSG_CTRUNC):
        for fd in descriptors:
            os.close(fd)
        return None
    return loads(data), descriptors


def _receive(sock: cpython.socket.socket) -> tuple[bytes, list[int], int]:
    room = cpython.socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
    length, ancillary, flags, _ = sock.recvmsg_into([_buffer], room, cpython.socket.MSG_CMSG_CLOEXEC)
    data = bytes(_buffer[:length])
    descriptors: list[int] = []
    for level, kind, rights in ancillary:
        if (level, kind) == (cpython.socket.SOL_SOCKET, cpython.socket.SCM_RIGHTS):
            descriptors += struct.unpack(f"{len(rights) // 4}i", rights[: len(rights) & ~3])
    return data, descriptors, flags


def listen(path: str) -> socket.socket:
    """Make a listening socket at `path`, in place of one that a dead process left."""
    import socket

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    temporary = f"{path}.{os.getpid()}"
    sock.bind(temporary)
    os.chmod(temporary, 0o600)
    sock.listen(64)
    os.rename(temporary, path)  # a client finds the old socket or the new one, never none
    return sock


def connect(path: str) -> socket.socket:
    """Connect to the process that listens at `path`."""
    import socket

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock
