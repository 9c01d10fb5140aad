"""How the processes of a host talk: JSON messages with file descriptors, over unix sockets that keep messages apart.

SOCK_SEQPACKET (unix(7)) keeps the boundaries of messages, so there is nothing to parse, and SCM_RIGHTS
(cmsg(3)) sends open files along. The sockets are in the run directory, which only root can enter.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

MAX_MESSAGE = 128 << 10
MAX_DESCRIPTORS = 8

Message = dict[str, Any]


def send(sock: socket.socket, message: Message, descriptors: list[int] | None = None, flags: int = 0) -> None:
    """Send one message; the descriptors stay open here."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"message of {len(data)} bytes")
    if descriptors:
        socket.send_fds(sock, [data], descriptors, flags)
    else:
        sock.send(data, flags)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message and its descriptors; None when the other side is gone."""
    try:
        data, descriptors, flags, _ = _receive(sock)
    except ConnectionResetError:
        # it ended without having read all of ours; this is told once, and before what it had sent
        data, descriptors, flags, _ = _receive(sock)
    if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in descriptors:
            os.close(fd)
        return None
    return json.loads(data), descriptors


def _receive(sock: socket.socket) -> tuple[bytes, list[int], int, Any]:
    return socket.recv_fds(sock, MAX_MESSAGE, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)


def listen(path: str) -> socket.socket:
    """A listening socket at `path`, replacing one that a dead process left."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    temporary = f"{path}.{os.getpid()}"
    sock.bind(temporary)
    os.chmod(temporary, 0o600)
    sock.listen(64)
    os.rename(temporary, path)  # a client finds the old socket or the new one, never none
    return sock


def connect(path: str) -> socket.socket:
    """A connection to the process that listens at `path`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock
