"""What differs between asyncio and threads: sockets, locks, background work. `_sync/network.py` is its counterpart.

The rest of this package is the source of `_sync/`, by scripts/unasync.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from typing import TypeVar

from insula.sdk.sockets import CHUNK, ClosableSocket, unreachable

T = TypeVar("T")
AsyncPieces = AsyncIterable[bytes] | Iterable[bytes]
"""The pieces of an upload, such as a file that is opened in binary mode."""
AsyncLock = asyncio.Lock


class AsyncSocket(ClosableSocket):
    """A connected socket of the running event loop; `timeout` is in seconds, for each operation."""

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        super().__init__(sock, timeout)
        sock.setblocking(False)

    @classmethod
    async def unix(cls, path: str, timeout: float | None) -> AsyncSocket:
        """Connect to a unix socket. Unavailable, Denied."""
        made = cls(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC), timeout)
        try:
            await asyncio.get_running_loop().sock_connect(made._sock, path)
        except BaseException as error:
            made.shut()
            if isinstance(error, OSError):
                raise unreachable(path, error) from None
            raise
        return made

    @classmethod
    async def tcp(cls, host: str, port: int, timeout: float) -> AsyncSocket:
        """Connect to the first address of a host that answers. OSError."""
        loop = asyncio.get_running_loop()
        refused: OSError | None = None
        for family, kind, number, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            made = cls(socket.socket(family, kind | socket.SOCK_CLOEXEC, number), timeout)
            try:
                made._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.timeout(timeout):
                    await loop.sock_connect(made._sock, address)
                return made
            except OSError as error:
                made.shut()
                refused = error
            except BaseException:
                made.shut()
                raise
        raise refused or OSError(f"{host} has no address")

    async def read(self) -> bytes:
        """Return what has arrived, waiting for it; b"" if the other side has closed. Unavailable after the timeout."""
        try:
            with self._operation() as sock:
                async with asyncio.timeout(self._timeout):
                    return await asyncio.get_running_loop().sock_recv(sock, CHUNK)
        except OSError:
            return b""

    async def write(self, data: bytes) -> bool:
        """Send data; False if the other side takes no more. Unavailable after the timeout."""
        try:
            with self._operation() as sock:
                async with asyncio.timeout(self._timeout):
                    await asyncio.get_running_loop().sock_sendall(sock, data)
        except OSError:
            return False
        return True


class AsyncBackground:
    """Runs a function while the block runs; what it raises is left out."""

    def __init__(self, function: Callable[[], Coroutine[object, object, None]]) -> None:
        self._function = function

    async def __aenter__(self) -> None:
        self._task = asyncio.ensure_future(self._function())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def in_thread(function: Callable[[], T]) -> T:
    """Call a function that may block."""
    return await asyncio.to_thread(function)


async def pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def pieces_of(pieces: AsyncPieces) -> AsyncIterator[bytes]:
    """Yield the pieces of an upload."""
    if isinstance(pieces, AsyncIterable):
        async for piece in pieces:
            yield piece
    else:
        for piece in pieces:
            yield piece


async def finish(items: AsyncIterator[T]) -> None:
    """Close a generator, which closes what it holds."""
    close = getattr(items, "aclose", None)
    if close is not None:
        with contextlib.suppress(RuntimeError):  # it runs: the error came from inside
            await close()
