"""The sockets on which a tenant's forwarder gets queries, over UDP and TCP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from insula.network.names.upstream import read_exactly
from insula.network.names.wire import MalformedMessage

Respond = Callable[[bytes, str, bool], Awaitable[bytes | None]]
IDLE: Final = 10.0  # seconds that a connection may wait for its next query
PER_CLIENT: Final = 20  # connections of an instance
_LARGEST: Final = 4096  # bytes of a query
_AT_ONCE: Final = 64  # queries before others have their turn
_TASKS: Final = 4096  # queries that are being answered


def datagram_socket(address: str, port: int) -> socket.socket:
    """Return a UDP socket. OSError."""
    sock = socket.socket(_family(address), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.bind((address, port))
    return sock


def stream_socket(address: str, port: int) -> socket.socket:
    """Return a listening TCP socket. OSError."""
    sock = socket.socket(_family(address), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    sock.listen(4096)
    return sock


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class QueryListener:
    """Passes queries from sockets to `respond`, and sends its responses."""

    def __init__(self, respond: Respond) -> None:
        self._respond = respond
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: Counter[str] = Counter()

    def datagrams(self, sock: socket.socket) -> None:
        """Answer the queries of a socket of `datagram_socket`."""
        self._loop.add_reader(sock.fileno(), self._read, sock)

    def streams(self, listener: socket.socket) -> None:
        """Answer the queries of a socket of `stream_socket`."""
        self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _read(self, sock: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                data, peer = sock.recvfrom(_LARGEST)
            except OSError:
                return
            if len(self._tasks) < _TASKS:
                self._start(self._answer(sock, data, peer))

    async def _answer(self, sock: socket.socket, data: bytes, peer: tuple[str, int]) -> None:
        response = await self._respond(data, peer[0], False)
        if response is not None:
            with contextlib.suppress(OSError):  # the client has gone, or its buffer is full: it will ask again
                sock.sendto(response, peer)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, peer = listener.accept()
            except OSError:
                return
            if self._connections[peer[0]] >= PER_CLIENT:
                sock.close()
                continue
            sock.setblocking(False)
            self._start(self._converse(sock, peer[0]))

    async def _converse(self, sock: socket.socket, client: str) -> None:
        """Answer queries one after the other (RFC 7766)."""
        self._connections[client] += 1
        try:
            while True:
                async with asyncio.timeout(IDLE):
                    length = int.from_bytes(await read_exactly(sock, 2), "big")
                    data = await read_exactly(sock, length)
                response = await self._respond(data, client, True)
                if response is None:
                    return
                async with asyncio.timeout(IDLE):
                    await self._loop.sock_sendall(sock, len(response).to_bytes(2, "big") + response)
        except (OSError, TimeoutError, MalformedMessage):
            return
        finally:
            sock.close()
            self._connections[client] -= 1
            if not self._connections[client]:
                del self._connections[client]
