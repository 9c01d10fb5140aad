"""The port ids of this process's netlink sockets (netlink(7), nl_pid), by which it knows changes of its own making.

A port id is unique in a network namespace, for a protocol.
"""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from typing import Final

_open: Final = Counter[int]()
_closed: Final = deque[int](maxlen=1024)
"""The last ones that were closed: what they have done may be told later."""


def add(port: int) -> None:
    _open[port] += 1


def discard(port: int) -> None:
    """Forget a socket that is closed; no error if it is forgotten."""
    if _open[port] > 1:
        _open[port] -= 1
    elif _open.pop(port, 0):
        _closed.append(port)


def is_own(port: int) -> bool:
    """Whether a port id is that of a socket of this process. One of a namespace has the process's PID."""
    return port == os.getpid() or port in _open or port in _closed


def of(descriptor: int) -> int | None:
    """Return the port id of a socket that a library has opened; None if the descriptor is none of netlink."""
    try:
        found = socket.socket(fileno=descriptor)
    except OSError:
        return None
    try:
        return int(found.getsockname()[0]) if found.family == socket.AF_NETLINK else None
    finally:
        found.detach()
