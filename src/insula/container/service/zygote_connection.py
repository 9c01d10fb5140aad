"""The connection of a `Runtime` to the zygote: numbered requests, their answers, and events in between."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
from collections.abc import Callable, Sequence

from insula.container import wire
from insula.container.service.dialer import Dialer
from insula.container.service.failures import ZygoteDied
from insula.container.service.protocol import ZYGOTE_SOCKET
from insula.model.errors import Failed

log = logging.getLogger("insula.container")
_FULL = 0.001
"""Seconds until a message is tried again, if the zygote's queue is full."""


class ZygoteConnection:
    """A connection that is made when it is needed, and again after the zygote has died.

    `on_event` is given each message that is no answer, `on_end` is called when the connection ends.
    """

    def __init__(
        self, dialer: Dialer, on_event: Callable[[wire.Message], object], on_end: Callable[[], object]
    ) -> None:
        self._dialer, self._on_event, self._on_end = dialer, on_event, on_end
        self._sock: socket.socket | None = None
        self._lock = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[wire.Message]] = {}
        self._replaced = False  # processes of another build

    async def connect(self) -> socket.socket:
        """Connect unless that is done. `Failed` if there is no zygote."""
        async with self._lock:
            if self._sock is None:
                if not self._replaced:
                    await self._dialer.replace_others()
                    self._replaced = True
                sock = await self._dialer.dial(ZYGOTE_SOCKET)
                loop = asyncio.get_running_loop()
                try:
                    await loop.sock_sendall(sock, b'{"op": "spares"}')
                except BaseException:
                    sock.close()
                    raise
                self._sock = sock
                loop.add_reader(sock, self._read, sock)  # sock_recv() would add and remove it for each message
            return self._sock

    async def request(self, message: wire.Message, descriptors: Sequence[int] = ()) -> wire.Message:
        """Send `message`, with copies of `descriptors`, and return the answer.

        `ZygoteDied` if the connection ends before it comes; `Failed`."""
        sock = await self.connect()
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[wire.Message] = loop.create_future()
        self._answers[number] = answer
        try:
            data = json.dumps({"n": number, **message}).encode()
            if len(data) > wire.MAX_MESSAGE:
                raise Failed("the request to the zygote is too long", "use fewer or shorter arguments")
            if descriptors:
                await _send(sock, data, descriptors)
            else:
                await loop.sock_sendall(sock, data)
            return await answer
        except ConnectionError:
            raise ZygoteDied("the zygote died meanwhile", "try again") from None
        finally:
            self._answers.pop(number, None)

    def close(self) -> None:
        """Close the connection. Tasks that wait for an answer get `ZygoteDied`."""
        if self._sock is None:
            return
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        self._sock = None
        self._on_end()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionResetError())

    def _read(self, sock: socket.socket) -> None:
        """Take one message, or the end of the connection."""
        try:
            data = sock.recv(wire.MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            self._take(json.loads(data))
        except Exception:
            log.exception("what the zygote says can't be understood")

    def _take(self, message: wire.Message) -> None:
        if "n" not in message:
            self._on_event(message)
            return
        answer = self._answers.get(message["n"])
        if answer and not answer.done():
            answer.set_result(message)


async def _send(sock: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    """Send a message with descriptors, which the event loop can't."""
    while True:
        try:
            socket.send_fds(sock, [data], descriptors)
        except BlockingIOError:
            await asyncio.sleep(_FULL)
        else:
            return
