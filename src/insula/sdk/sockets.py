"""What the sockets of both kinds of clients have in common: how they end, and what is an error."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator

from insula.model.errors import Denied, InsulaError, Unavailable

CHUNK = 65536
_START_HINT = "start the daemon: `systemctl start insulad`, or scripts/up where there is no systemd"


class ClosableSocket:
    """A connected socket. It may be closed while it is being read or written elsewhere, which ends that: the descriptor
    is closed after the last operation, since another file may have its number from then on."""

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self._sock = sock
        self._timeout = timeout
        self._lock = threading.Lock()
        self._busy = 0
        self._closing = False

    @contextlib.contextmanager
    def _operation(self) -> Iterator[socket.socket]:
        """Hold the socket for an operation. ConnectionResetError if it is closed. Unavailable after the timeout."""
        with self._lock:
            if self._closing:
                raise ConnectionResetError
            self._busy += 1
        try:
            yield self._sock
        except TimeoutError:
            what = "no answer" if self._timeout is None else f"no answer within {self._timeout:g} s"
            raise Unavailable(what, "try again, or with a longer timeout") from None
        finally:
            with self._lock:
                self._busy -= 1
                if self._closing and not self._busy:
                    self._sock.close()

    def limit(self, timeout: float | None) -> None:
        """Change the timeout of each operation."""
        self._timeout = timeout

    def shut(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            if not self._busy:
                self._sock.close()

    def stale(self) -> bool:
        """Whether a connection on which nothing is awaited was closed by the other side, or has data all the same."""
        with self._lock:
            if self._closing:
                return True
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            return bool(poll.poll(0))


def reason(error: OSError) -> str:
    """Return why a connection failed; asyncio puts the address in place of the error's text."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or "no answer"


def unreachable(path: str, error: OSError) -> InsulaError:
    """Return the error for a unix socket that can't be connected to."""
    if isinstance(error, PermissionError):
        what = f"{path} can't be opened: permission denied"
        return Denied(what, "be root or a member of the group `insula`, or use users.sock")
    return Unavailable(f"insulad does not answer at {path} ({reason(error)})", _START_HINT)
