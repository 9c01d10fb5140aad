"""Ethernet frames with UDP over IPv4 or IPv6, and with ICMPv6."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import Final

from insula.network.packets import checksum, frame

_UDP, _ICMPV6 = 17, 58
_HOPS: Final = 255  # RFC 4861, 4.2: others are no neighbors


def udp(macs: tuple[str, str], addresses: tuple[str, str], ports: tuple[int, int], payload: bytes) -> bytes:
    """Build a frame with a datagram; each pair is (source, target)."""
    packed = [ip_address(each).packed for each in addresses]
    body = struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload
    if len(packed[0]) == 16:
        body = body[:6] + _checksum6(packed, _UDP, body) + body[8:]
        return frame(macs[1], macs[0], _ipv6(packed, _UDP, body))
    pseudo = packed[0] + packed[1] + struct.pack("!HH", _UDP, len(body))
    body = body[:6] + struct.pack("!H", checksum(pseudo + body) or 0xFFFF) + body[8:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, _UDP, 0) + packed[0] + packed[1]
    return frame(macs[1], macs[0], head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body)


def icmpv6(macs: tuple[str, str], addresses: tuple[str, str], message: bytes) -> bytes:
    """Build a frame with an ICMPv6 message, whose checksum is set."""
    packed = [ip_address(each).packed for each in addresses]
    message = message[:2] + b"\0\0" + message[4:]
    message = message[:2] + _checksum6(packed, _ICMPV6, message) + message[4:]
    return frame(macs[1], macs[0], _ipv6(packed, _ICMPV6, message))


def _checksum6(addresses: list[bytes], protocol: int, body: bytes) -> bytes:
    pseudo = addresses[0] + addresses[1] + struct.pack("!II", len(body), protocol)
    return struct.pack("!H", checksum(pseudo + body) or 0xFFFF)


def _ipv6(addresses: list[bytes], protocol: int, body: bytes) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(body), protocol, _HOPS) + addresses[0] + addresses[1] + body


def domain_name(name: str) -> bytes:
    """Encode a domain name without compression (RFC 1035, 3.1)."""
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
