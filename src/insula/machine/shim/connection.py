"""The shim's socket: connections to it, and their messages, which are JSON objects and may come with descriptors."""

from __future__ import annotations

import contextlib
import os
import struct

from insula.machine.shim.common import NAME
from insula.model.cpython import dumps, loads, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from insula.kernel.event_loop import EventLoop

_MOST = 1 << 17  # bytes of a message
_RIGHTS = 256  # and of the descriptors with it


class ShimConnection:
    """A connection of insulad, or of a program that stands for one in the guest (client.py). Its other side may be
    gone at any time: then nothing is sent any more."""

    def __init__(self, sock: socket.socket, loop: EventLoop) -> None:
        self._socket, self._loop = sock, loop

    def watch(self, handler: Callable[[], object]) -> None:
        """Have a handler called when there is a message, or the end."""
        self._loop.watch(self._socket.fileno(), lambda _: handler())

    def receive(self) -> ShimMessage | None:
        """A message; None at the end, and for what is no message."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_MOST, _RIGHTS, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return None
        message = ShimMessage(self, _descriptors(ancillary))
        with contextlib.suppress(ValueError, RecursionError):
            message.content = loads(data.decode())
        if isinstance(message.content, dict):
            return message
        message.close()
        return None

    def tell(self, content: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(dumps(content).encode())

    def reply(self, content: dict[str, Any]) -> None:
        """Tell something for the last time."""
        self.tell(content)
        self.close()

    def close(self) -> None:
        """Close it; also if it is closed already."""
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()


class ShimMessage:
    """What has come on a connection: its content, and descriptors, which `close` closes but for those that were
    taken."""

    content: Any = None

    def __init__(self, connection: ShimConnection, descriptors: list[int]) -> None:
        self.connection, self.descriptors = connection, descriptors

    def take(self) -> int:
        """The next descriptor, which whoever takes it closes; -1 if there is none."""
        return self.descriptors.pop(0) if self.descriptors else -1

    def take_all(self) -> list[int]:
        """All of them, as above."""
        found, self.descriptors = self.descriptors, []
        return found

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


def listen(loop: EventLoop, accepted: Callable[[ShimConnection], object]) -> None:
    """Listen; `accepted` is called with each connection."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    listener.bind(NAME)
    listener.listen(64)

    def accept(_: int) -> None:
        fd, _address = listener._accept()  # type: ignore[attr-defined]
        accepted(ShimConnection(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd), loop))

    loop.watch(listener.fileno(), accept)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found += struct.unpack(f"{len(rights) // 4}i", rights[: len(rights) & ~3])
    return found
