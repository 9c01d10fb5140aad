"""The streams of a process, for asyncio code: a connection to the monitor, which relays them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from itertools import count

from insula.container import wire
from insula.model.stream import Kind

_TURN = 32  # messages in a row


class ProcessStreams:
    """The streams of a process: iterate for its output, `send` for its input."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()  # the event loop has one writer for each socket: a second one replaces it
        self.complete = False  # once all was read; it stays False when the monitor died

    async def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]:
        """Yield STDOUT and STDERR frames, until all is read after `finish`, or until the monitor dies."""
        reset = False
        for number in count(1):
            if number % _TURN == 0:  # sock_recv returns at once while there is more: others have their turn
                await asyncio.sleep(0)
            try:
                data = await self._loop.sock_recv(self._sock, wire.MAX_MESSAGE)
            except ConnectionResetError:
                # it closed without having read all of ours, such as a new size of a terminal that is gone: this is told
                # once, and before what it had sent
                if reset:
                    return
                reset = True
                continue
            except ConnectionError:
                return
            if not data:
                return
            if data[0] == Kind.EXIT:
                self.complete = True
                return
            yield Kind(data[0]), data[1:]

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send STDIN, STDIN_EOF or RESIZE."""
        view = memoryview(payload)
        for start in range(0, max(1, len(view)), 32 << 10):
            async with self._sending:
                with contextlib.suppress(ConnectionError):
                    await self._loop.sock_sendall(self._sock, bytes((kind,)) + view[start : start + (32 << 10)])

    async def finish(self) -> None:
        """Have the rest of the output sent after the end of the process; then the iteration ends."""
        await self.send(Kind.EXIT)

    def close(self) -> None:
        self._sock.close()
