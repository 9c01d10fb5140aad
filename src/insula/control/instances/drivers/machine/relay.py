"""The bytes of a machine that moves: passed between QEMU's sockets here and the link to the other host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from insula.control.instances.drivers.migration import HostLink
from insula.model.errors import Failed, InsulaError
from insula.model.stream import MAX_PAYLOAD, Kind

STALL: Final = 30.0
"""Seconds for an answer of the other host, and without any byte from or to it: the machine's own writes wait for it."""
PIECE: Final = MAX_PAYLOAD - 1
"""Bytes that are sent at once: a frame of a further disk has one more."""
_LOOK: Final = 1.0
_MESSAGES: Final = 8
_SO_SNDBUFFORCE: Final = 32  # socket(7)
_LOST: Final = "the connection to the other host is lost"


class LinkChannel(NamedTuple):
    """What bytes on a link are of: the kind of their frames, and which further disk."""

    kind: Kind
    number: int = 0

    @classmethod
    def of(cls, kind: Kind, payload: bytes) -> tuple[LinkChannel, bytes]:
        """The channel of a frame, and the bytes in it. IndexError for one that does not tell."""
        return (cls(kind, payload[0]), payload[1:]) if kind is Kind.FURTHER else (cls(kind), payload)

    def payload(self, data: bytes) -> bytes:
        """What a frame with these bytes has in it."""
        return bytes([self.number]) + data if self.kind is Kind.FURTHER else data


DISK, MEMORY = LinkChannel(Kind.DISK), LinkChannel(Kind.MEMORY)


class LinkRelay:
    """Passes bytes between a link and our ends of sockets to QEMU, and messages. Each direction waits while the other
    side takes nothing."""

    def __init__(self, link: HostLink, ends: Mapping[LinkChannel, socket.socket]) -> None:
        self._link, self._ends = link, ends
        self._messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_MESSAGES)
        self._tasks = [asyncio.ensure_future(self._receive())]
        self._tasks += [asyncio.ensure_future(self._send(channel, end)) for channel, end in ends.items()]
        self.lost = asyncio.Event()
        self._asked: dict[LinkChannel, float] = {}  # when QEMU there was sent what it has not answered yet
        for each in ends.values():
            each.setblocking(False)

    async def tell(self, what: str, value: Any = True) -> None:
        """Send a message. Failed if the link is lost."""
        await self._say({what: value})

    async def refuse(self, error: InsulaError) -> None:
        """Tell why it fails here. Failed if the link is lost."""
        await self._say({"error": error.message, "hint": error.hint})

    async def _say(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(STALL):
                await self._link.send(Kind.MESSAGE, json.dumps(message).encode())
        except (OSError, TimeoutError):
            raise Failed(_LOST, "try again") from None

    async def told(self, what: str, seconds: float = STALL) -> Any:
        """Wait for a message, and return what is in it. Failed: also with the reason that the other host tells."""
        try:
            async with asyncio.timeout(seconds):
                message = await self._messages.get()
        except TimeoutError:
            raise Failed("the other host does not answer in time", "try again") from None
        if message is None:
            raise Failed(_LOST, "try again")
        if "error" in message:
            raise Failed(f"the other host refuses: {str(message['error'])[:500]}", str(message.get("hint", ""))[:500])
        if what not in message:
            raise Failed("the other host answers with what is no answer")
        return message[what]

    async def _receive(self) -> None:
        try:
            while frame := await self._link.next():
                channel, payload = LinkChannel.of(*frame)
                self._asked.pop(channel, None)
                if end := self._ends.get(channel):
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # QEMU wants no more of it
                        await asyncio.get_running_loop().sock_sendall(end, payload)
                elif channel.kind is Kind.MESSAGE:
                    message = json.loads(payload)
                    await self._messages.put(message if isinstance(message, dict) else {})
                    if "error" in message:
                        break
        except (OSError, ValueError, LookupError, RecursionError, TypeError, InsulaError):
            pass
        self.lost.set()
        await self._messages.put(None)

    async def _send(self, channel: LinkChannel, end: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the link is lost, which `_receive` notices
            while data := await loop.sock_recv(end, PIECE):
                data += _what_is_there(end, PIECE - len(data))
                if channel.kind is not Kind.MEMORY:
                    self._asked.setdefault(channel, time.monotonic())
                await self._link.send(channel.kind, channel.payload(data))

    async def watch(self) -> None:
        """Have the link be lost when the other side has not answered to a disk for `STALL` seconds."""
        while not any(time.monotonic() > asked + STALL for asked in self._asked.values()):
            await asyncio.sleep(_LOOK)
        self.lost.set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for each in self._ends.values():
            each.close()


@asynccontextmanager
async def relayed(link: HostLink, ends: Mapping[LinkChannel, socket.socket]) -> AsyncIterator[LinkRelay]:
    relay = LinkRelay(link, ends)
    try:
        yield relay
    finally:
        await relay.close()


@asynccontextmanager
async def telling(relay: LinkRelay) -> AsyncIterator[None]:
    """Tell the other host why it fails."""
    try:
        yield
    except InsulaError as error:
        with contextlib.suppress(Failed):
            await relay.refuse(error)
        raise


async def unless_lost(relay: LinkRelay, waiting: Awaitable[Any]) -> Any:
    """What is waited for. Failed if the link is lost before."""
    tasks = asyncio.ensure_future(waiting), asyncio.ensure_future(relay.lost.wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            await relay.told("", 0.1)  # raises why
        return await tasks[0]
    except TimeoutError:
        raise Failed("the machine was not sent in time", "try again") from None
    finally:
        for task in tasks:
            task.cancel()


def _what_is_there(end: socket.socket, most: int) -> bytes:
    """What can be read without waiting: QEMU writes small pieces, and each that is sent costs a turn of the loop."""
    found: list[bytes] = []
    with contextlib.suppress(OSError):
        while most > 0 and (data := end.recv(most)):
            found.append(data)
            most -= len(data)
    return b"".join(found)


def widen(*senders: socket.socket) -> None:
    """Have these sockets take a whole piece at once: each turn of the loop costs the same, however little it moves."""
    for each in senders:
        with contextlib.suppress(OSError):
            each.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * PIECE)


def waiting(count: int) -> tuple[socket.socket, list[socket.socket]]:
    """A listening socket, and so many connections that wait to be accepted there: the only ones, since its name is
    gone."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{directory}/socket")
        listener.listen(count)
        connections = [opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(count)]
        for each in connections:
            each.connect(f"{directory}/socket")
        opened.pop_all()
    return listener, connections
