"""DHCPv6 (RFC 8415): the answer to a client's message.

The client is known by its link-local address, which the rules of its port allow to it only. It gets the IPv6 address of
the port for each of its identity associations (IA_NA), and no prefixes and temporary addresses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import IPv6Address, IPv6Network
from typing import Final

from insula.network.dhcp.frames import domain_name
from insula.network.dhcp.lease import SECONDS, PortLease

SERVER, CLIENT = 547, 546
GROUP: Final = "ff02::1:2"
"""All servers and relay agents of a link."""
_SOLICIT, _ADVERTISE, _REQUEST, _CONFIRM, _RENEW, _REBIND, _REPLY, _RELEASE, _DECLINE, _INFORMATION = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 11,
)  # fmt: skip
_CLIENT_ID, _SERVER_ID, _IA_NA, _IA_TA, _IA_ADDRESS, _STATUS, _RAPID, _DNS, _DOMAINS, _IA_PD = (
    1, 2, 3, 4, 5, 13, 14, 23, 24, 25,
)  # fmt: skip
_NO_ADDRESSES, _NOT_ON_LINK, _NO_PREFIXES = 2, 4, 6
_TO_ANY: Final = (_SOLICIT, _CONFIRM, _REBIND)
_TO_US: Final = (_REQUEST, _RENEW, _RELEASE, _DECLINE)
_BYTES: Final = 1500  # of a message that is looked at
_ASSOCIATIONS: Final = 8  # that are answered


def answer(data: bytes, lease: PortLease) -> bytes | None:
    """Return the answer to a message of the port's client; None if it gets none. Never raises, whatever `data` is."""
    if not 4 <= len(data) <= _BYTES or lease.address6 is None:
        return None
    kind, options = data[0], list(_options(data[4:]))
    given = dict(reversed(options))  # the first of each kind
    ours = _server_id(lease)
    if (kind in _TO_ANY and _SERVER_ID in given) or (kind in _TO_US and given.get(_SERVER_ID) != ours):
        return None
    if kind == _INFORMATION and given.get(_SERVER_ID, ours) != ours:
        return None
    if kind not in (*_TO_ANY, *_TO_US, _INFORMATION) or (_CLIENT_ID not in given and kind != _INFORMATION):
        return None
    rapid = kind == _SOLICIT and _RAPID in given
    found = [(_SERVER_ID, ours), *((_CLIENT_ID, given[_CLIENT_ID]) for _ in range(_CLIENT_ID in given))]
    found += [(_RAPID, b"")] if rapid else []
    found += _about(kind, options, lease)
    head = bytes([_ADVERTISE if kind == _SOLICIT and not rapid else _REPLY]) + data[1:4]
    return head + b"".join(_option(code, value) for code, value in found)


def _about(kind: int, options: list[tuple[int, bytes]], lease: PortLease) -> Iterator[tuple[int, bytes]]:
    if kind in (_RELEASE, _DECLINE):
        yield _STATUS, _status(0)
        return
    if kind == _CONFIRM:
        yield (
            _STATUS,
            _status(0 if all(_is_here(value, lease) for code, value in options if code == _IA_NA) else _NOT_ON_LINK),
        )
        return
    if kind != _INFORMATION:
        for code, value in options[:_ASSOCIATIONS]:
            if code == _IA_NA and len(value) >= 12:
                yield _IA_NA, _association(value[:4], lease)
            elif code == _IA_PD and len(value) >= 12:
                yield _IA_PD, value[:4] + bytes(8) + _option(_STATUS, _status(_NO_PREFIXES))
            elif code == _IA_TA and len(value) >= 4:
                yield _IA_TA, value[:4] + _option(_STATUS, _status(_NO_ADDRESSES))
    if lease.gateway6:
        yield _DNS, IPv6Address(lease.gateway6).packed
    yield _DOMAINS, domain_name(lease.domain)


def _association(identifier: bytes, lease: PortLease) -> bytes:
    address = IPv6Address(lease.address6 or "::").packed + struct.pack("!II", SECONDS, SECONDS)
    return identifier + struct.pack("!II", SECONDS // 2, SECONDS * 7 // 8) + _option(_IA_ADDRESS, address)


def _is_here(association: bytes, lease: PortLease) -> bool:
    """Whether the addresses of a client's association are in the port's subnet."""
    subnet = IPv6Network(lease.subnet6 or "::/128")
    return all(
        len(value) < 24 or IPv6Address(value[:16]) in subnet
        for code, value in _options(association[12:])
        if code == _IA_ADDRESS
    )


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        code, length = struct.unpack_from("!HH", data, at)
        if at + 4 + length > len(data):
            return
        yield code, data[at + 4 : at + 4 + length]
        at += 4 + length


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("!HH", code, len(value)) + value


def _status(code: int) -> bytes:
    return struct.pack("!H", code)


def _server_id(lease: PortLease) -> bytes:
    """The DUID-LL of the gateway (RFC 8415, 11.4)."""
    link_layer, ethernet = 3, 1
    return struct.pack("!HH", link_layer, ethernet) + bytes.fromhex(lease.gateway_mac.replace(":", ""))
