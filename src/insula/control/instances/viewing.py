"""`Viewers`: who looks at the screens of instances, by the Remote Framebuffer protocol (RFB, VNC; RFC 6143).

Each viewer is a connection of its own. What it sends and gets is passed on as it is; both directions wait for whoever
does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from insula.control.instances.attach_session import exit_frame
from insula.control.instances.drivers.base import Driver
from insula.control.instances.managed import ManagedInstance
from insula.model import rules
from insula.model.errors import Conflict
from insula.model.objects import Exit
from insula.model.stream import Kind

_PIECE = 64 << 10


class Viewer:
    """One viewer. Frames of STDIN go to the screen, those of STDOUT come from it; EXIT tells that the machine has
    closed the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        with contextlib.suppress(OSError):  # the machine has ended, which the other direction reports
            if kind is Kind.STDIN:
                await asyncio.get_running_loop().sock_sendall(self._connection, payload)
            elif kind is Kind.STDIN_EOF:
                self._connection.shutdown(socket.SHUT_WR)

    async def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]:
        while data := await self._received():
            yield Kind.STDOUT, data
        yield exit_frame(Exit(exit_status=0, finished=time.time()))

    async def _received(self) -> bytes:
        try:
            return await asyncio.get_running_loop().sock_recv(self._connection, _PIECE)
        except OSError:
            return b""


class Viewers:
    """Counts the viewers of each instance, of which there are `rules.MAX_VIEWERS` at most: QEMU has a picture of the
    screen for each."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()

    @asynccontextmanager
    async def viewer(self, managed: ManagedInstance, driver: Driver) -> AsyncIterator[Viewer]:
        """One more viewer, until the end of the block. Conflict if there are too many; Failed, NotFound."""
        instance = managed.instance
        if self._count[instance.id] >= rules.MAX_VIEWERS:
            what = f"{rules.MAX_VIEWERS} viewers look at the screen of {instance.name} already"
            raise Conflict(what, "close one of them")
        self._count[instance.id] += 1
        try:
            connection = await driver.vnc(instance.id)
            with connection:
                yield Viewer(connection)
        finally:
            self._count[instance.id] -= 1
            self._count += Counter()  # drops those without one
