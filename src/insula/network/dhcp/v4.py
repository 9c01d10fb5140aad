"""DHCP (RFC 2131): the answer to a client's message.

DISCOVER and REQUEST get the address of the port; a REQUEST for another address gets a NAK, so that the client asks
anew. INFORM gets the rest. DECLINE and RELEASE change nothing, since the address is the port's in any case. Messages of
relay agents are ignored: they can't come from an instance.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, ip_address
from typing import Final, NamedTuple

from insula.network.dhcp.frames import domain_name
from insula.network.dhcp.lease import SECONDS, PortLease

SERVER, CLIENT = 67, 68
EVERYBODY: Final = "255.255.255.255"
_HEAD: Final = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
_COOKIE: Final = bytes([99, 130, 83, 99])
_REQUEST, _REPLY, _ETHERNET, _MAC, _BROADCAST = 1, 2, 1, 6, 0x8000
_DISCOVER, _OFFER, _ASK, _ACK, _NAK, _INFORM = 1, 2, 3, 5, 6, 8
_PAD, _END = 0, 255
_MASK, _ROUTER, _DNS, _HOST, _DOMAIN, _MTU, _LOCAL, _ADDRESS, _LEASE = 1, 3, 6, 12, 15, 26, 28, 50, 51
_TYPE, _SERVER_ID, _WANTED, _MAX_SIZE, _RENEWAL, _REBINDING, _RAPID, _SEARCH, _ROUTES = (
    53,
    54,
    55,
    57,
    58,
    59,
    80,
    119,
    121,
)
_ALWAYS: Final = frozenset({_TYPE, _SERVER_ID, _LEASE, _RENEWAL, _REBINDING, _MASK, _ROUTER, _DNS, _RAPID, _ROUTES})
_LEAST: Final = 576  # bytes of a packet that each client takes
_NOTHING: Final = bytes(4)


class Dhcp4Answer(NamedTuple):
    """A message of the server, and the IP address that it is sent to."""

    payload: bytes
    target: str


class _Message(NamedTuple):
    number: int
    flags: int
    own: bytes
    hardware: bytes
    options: dict[int, bytes]

    @property
    def mac(self) -> str:
        return self.hardware[:_MAC].hex(":")


def answer(data: bytes, find: Callable[[str], PortLease | None]) -> tuple[PortLease, Dhcp4Answer] | None:
    """Return the lease of the client and the answer to its message; None if it gets none. `find` returns the lease of a
    MAC address. Never raises, whatever `data` is."""
    message = _parse(data)
    if message is None or (lease := find(message.mac)) is None:
        return None
    kind, own = message.options.get(_TYPE, b""), ip_address(lease.address).packed
    if kind == bytes([_DISCOVER]):
        rapid = _RAPID in message.options
        return lease, _made(message, lease, _ACK if rapid else _OFFER, own, [(_RAPID, b"")] if rapid else [])
    if kind == bytes([_INFORM]):
        return lease, _made(message, lease, _ACK, _NOTHING)
    if kind != bytes([_ASK]):
        return None
    if message.options.get(_SERVER_ID, ip_address(lease.gateway).packed) != ip_address(lease.gateway).packed:
        return None  # it has chosen another server
    asked = message.options.get(_ADDRESS, message.own)
    return lease, _made(message, lease, _ACK if asked == own else _NAK, own)


def _parse(data: bytes) -> _Message | None:
    if len(data) < _HEAD.size:
        return None
    operation, kind, length, _, number, _, flags, own, _, _, relay, hardware, _, _, cookie = _HEAD.unpack_from(data)
    if (operation, kind, length, relay, cookie) != (_REQUEST, _ETHERNET, _MAC, _NOTHING, _COOKIE):
        return None
    options: dict[int, bytes] = {}
    at = _HEAD.size
    while at < len(data) and data[at] != _END:
        if data[at] == _PAD:
            at += 1
            continue
        if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
            return None
        options[data[at]] = options.get(data[at], b"") + data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    return _Message(number, flags, own, hardware, options)


def _made(
    message: _Message, lease: PortLease, kind: int, yours: bytes, more: Iterable[tuple[int, bytes]] = ()
) -> Dhcp4Answer:
    refused, server = kind == _NAK, ip_address(lease.gateway).packed
    target = EVERYBODY if refused or message.flags & _BROADCAST else lease.address
    if not refused and message.own != _NOTHING:
        target = str(IPv4Address(message.own)) if message.own == ip_address(lease.address).packed else EVERYBODY
    head = _HEAD.pack(
        _REPLY, _ETHERNET, _MAC, 0, message.number, 0, message.flags, b"" if refused else message.own,
        b"" if refused else yours, _NOTHING, _NOTHING, message.hardware, b"", b"", _COOKIE,
    )  # fmt: skip
    options = [(_TYPE, bytes([kind])), (_SERVER_ID, server), *more]
    if not refused:
        options += _told(lease, timed=yours != _NOTHING)
    return Dhcp4Answer(head + _packed(message, options, lease), target)


def _told(lease: PortLease, *, timed: bool) -> Iterable[tuple[int, bytes]]:
    """Yield the options of a lease, the most important ones first."""
    subnet, gateway = IPv4Network(lease.subnet), ip_address(lease.gateway).packed
    if timed:
        yield from ((_LEASE, _u32(SECONDS)), (_RENEWAL, _u32(SECONDS // 2)), (_REBINDING, _u32(SECONDS * 7 // 8)))
    yield _MASK, subnet.netmask.packed
    if lease.first:
        yield _ROUTER, gateway
    yield _DNS, gateway
    yield _MTU, struct.pack("!H", lease.mtu)
    yield _DOMAIN, lease.domain.encode()
    yield _HOST, lease.name.encode()
    yield _LOCAL, subnet.broadcast_address.packed
    yield _SEARCH, domain_name(lease.domain)
    if routes := lease.routes_of(4):
        # who gets these ignores the router's option (RFC 3442)
        routes = [*(["0.0.0.0/0"] if lease.first else []), *routes]
        yield _ROUTES, b"".join(_route(IPv4Network(each), gateway) for each in routes)


def _route(destination: IPv4Network, gateway: bytes) -> bytes:
    length = destination.prefixlen
    return bytes([length]) + destination.network_address.packed[: (length + 7) // 8] + gateway


def _u32(value: int) -> bytes:
    return struct.pack("!I", value)


def _packed(message: _Message, options: Iterable[tuple[int, bytes]], lease: PortLease) -> bytes:
    """Pack those options that the client wants, as far as they fit into the largest message that it takes."""
    wanted = message.options.get(_WANTED)
    most = int.from_bytes(message.options.get(_MAX_SIZE, b"")[:2], "big")
    room = min(max(most, _LEAST), max(lease.mtu, _LEAST)) - 28 - _HEAD.size - 1
    packed = b""
    for code, value in options:
        if code in _ALWAYS or wanted is None or code in wanted:
            pieces = [value[start : start + 255] for start in range(0, len(value), 255)] or [b""]  # RFC 3396
            part = b"".join(bytes([code, len(piece)]) + piece for piece in pieces)
            if len(packed) + len(part) <= room:
                packed += part
    return packed + bytes([_END])
