"""What differs between threads and asyncio: sockets, locks, background work. `_async/network.py` is its counterpart.

The rest of this package is made from `_async/` by scripts/unasync.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from insula.sdk.sockets import CHUNK, ClosableSocket, unreachable

T = TypeVar("T")
Pieces = Iterable[bytes]
"""The pieces of an upload, such as a file that is opened in binary mode."""
Lock = threading.Lock


class Socket(ClosableSocket):
    """A connected socket; `timeout` is in seconds, for each operation."""

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        super().__init__(sock, timeout)
        sock.settimeout(timeout)

    def limit(self, timeout: float | None) -> None:
        super().limit(timeout)
        self._sock.settimeout(timeout)

    @classmethod
    def unix(cls, path: str, timeout: float | None) -> Socket:
        """Connect to a unix socket. Unavailable, Denied."""
        made = cls(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC), timeout)
        try:
            made._sock.connect(path)
        except OSError as error:
            made.shut()
            raise unreachable(path, error) from None
        return made

    @classmethod
    def tcp(cls, host: str, port: int, timeout: float) -> Socket:
        """Connect to the first address of a host that answers. OSError."""
        sock = socket.create_connection((host, port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock, timeout)

    def read(self) -> bytes:
        """Return what has arrived, waiting for it; b"" if the other side has closed. Unavailable after the timeout."""
        try:
            with self._operation() as sock:
                return sock.recv(CHUNK)
        except OSError:
            return b""

    def write(self, data: bytes) -> bool:
        """Send data; False if the other side takes no more. Unavailable after the timeout."""
        try:
            with self._operation() as sock:
                sock.sendall(data, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True


class Background:
    """Runs a function in a thread while the block runs; what it raises is left out."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(Exception):
            self._function()


def in_thread(function: Callable[[], T]) -> T:
    """Call a function that may block."""
    return function()


def pause(seconds: float) -> None:
    time.sleep(seconds)


def pieces_of(pieces: Pieces) -> Iterator[bytes]:
    """Yield the pieces of an upload."""
    yield from pieces


def finish(items: Iterator[T]) -> None:
    """Close a generator, which closes what it holds."""
    close = getattr(items, "close", None)
    if close is not None:
        with contextlib.suppress(RuntimeError, ValueError):  # it runs: the error came from inside
            close()
