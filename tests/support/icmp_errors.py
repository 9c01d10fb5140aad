"""ICMP errors as a sender sees them: who reported a datagram, and why (ip(7), IP_RECVERR)."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import NamedTuple

from tests.support.lab import SOON, Instance

HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}
"""The bytes of the headers of IP and UDP."""
_RECVERR: dict[int, tuple[int, int]] = {socket.AF_INET: (0, 11), socket.AF_INET6: (41, 25)}
_DISCOVER: dict[int, tuple[int, int]] = {socket.AF_INET: (0, 10), socket.AF_INET6: (41, 23)}
_HOPS: dict[int, tuple[int, int]] = {socket.AF_INET: (0, 2), socket.AF_INET6: (41, 16)}
_PROBE, _ERRQUEUE = 3, 0x2000  # IP_PMTUDISC_PROBE: set DF, ignore what is known


class Reported(NamedTuple):
    """An error: the error number it stands for, the router or host that sent it, and with EMSGSIZE the MTU."""

    number: int
    by: str
    mtu: int


def reported(
    sender: Instance, address: str, *, hops: int = 64, size: int = 100, port: int = 33434, wait: float = 5 * SOON
) -> Reported | None:
    """Send a datagram in a packet of this size, which may not be fragmented, over so many hops at most. Returns the
    error that comes back; None if there is none in time."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with sender.socket(family, socket.SOCK_DGRAM) as sock:
        keep_errors(sock, hops)
        sock.settimeout(wait)
        sock.connect((address, port))
        sock.send(bytes(size - HEADERS[family]))
        return error_of(sock)


def keep_errors(sock: socket.socket, hops: int) -> None:
    """Have errors kept for the socket, whose packets may not be fragmented and go over so many hops at most."""
    sock.setsockopt(*_RECVERR[sock.family], 1)
    sock.setsockopt(*_DISCOVER[sock.family], _PROBE)
    sock.setsockopt(*_HOPS[sock.family], hops)


def error_of(sock: socket.socket) -> Reported | None:
    """The error that comes back to a socket for which errors are kept; None if there is none in time."""
    six = sock.family == socket.AF_INET6
    with contextlib.suppress(OSError):
        sock.recv(1)  # waits for the error
    try:
        _, ancillary, _, _ = sock.recvmsg(9000, 512, _ERRQUEUE)
    except BlockingIOError:
        return None
    data = ancillary[0][2]
    number, origin = struct.unpack_from("=IB", data)
    (mtu,) = struct.unpack_from("=I", data, 8)
    assert origin in (2, 3), "from a router, not from the own kernel"
    return Reported(number, socket.inet_ntop(sock.family, data[24:40] if six else data[20:24]), mtu)
