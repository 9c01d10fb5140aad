"""Probe packets, made and recognised: IPv4 and IPv6 with ICMP echo, UDP or a TCP SYN, each with a token inside.

They carry a DSCP that the host never forwards, and a hop limit that ends one step behind the host, so that a probe
can't leave this machine whatever its rules are worth.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

PROTOCOLS: Final = ("icmp", "udp", "tcp")
DSCP: Final = 0x3F
HOPS: Final = 4  # instance → its router → host → another tenant's router → instance
UDP_PORT: Final = 9  # discard, RFC 863
_NUMBER = {4: {"icmp": 1, "udp": 17, "tcp": 6}, 6: {"icmp": 58, "udp": 17, "tcp": 6}}
_TOKEN = struct.Struct("!IB")


@dataclass(frozen=True)
class Seen:
    """A probe that arrived: the number of its token, its protocol, who sent it, and whether it is an echo's answer."""

    number: int
    protocol: str
    source: str
    reply: bool


class Minter:
    """Makes packets with tokens of one run and recognises them; tokens of other runs mean nothing to it."""

    def __init__(self) -> None:
        self._mark = b"insula" + os.urandom(8)

    def packet(self, protocol: str, source: str, target: str, number: int) -> bytes:
        """A whole IP packet; `number` is what `Seen` will have."""
        version = 6 if ":" in target else 4
        token = self._mark + _TOKEN.pack(number, PROTOCOLS.index(protocol))
        sender, receiver = ip_address(source).packed, ip_address(target).packed
        upper = _upper(version, protocol, sender, receiver, number, token)
        if version == 6:
            first = 6 << 28 | DSCP << 22
            return struct.pack("!IHBB", first, len(upper), _NUMBER[6][protocol], HOPS) + sender + receiver + upper
        head = struct.pack("!BBHHHBBH", 0x45, DSCP << 2, 20 + len(upper), 0, 0, HOPS, _NUMBER[4][protocol], 0)
        head += sender + receiver
        return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + upper

    def read(self, packet: bytes) -> Seen | None:
        """The probe in an IP packet that was received, None if there is none."""
        at = packet.find(self._mark)
        if at < 0 or len(packet) < at + len(self._mark) + _TOKEN.size:
            return None
        number, protocol = _TOKEN.unpack_from(packet, at + len(self._mark))
        if packet[0] >> 4 == 6:
            source, reply = packet[8:24], packet[6] == 58 and packet[40] == 129
        else:
            source, reply = packet[12:16], packet[9] == 1 and packet[(packet[0] & 15) * 4] == 0
        return Seen(number, PROTOCOLS[protocol % len(PROTOCOLS)], str(ip_address(source)), reply)


def _upper(version: int, protocol: str, source: bytes, target: bytes, number: int, token: bytes) -> bytes:
    if protocol == "icmp":
        body, at = struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, number & 0xFFFF, 1) + token, 2
    elif protocol == "udp":
        body, at = struct.pack("!HHHH", 40000, UDP_PORT, 8 + len(token), 0) + token, 6
    else:
        syn, words = 2, 5
        body = struct.pack("!HHIIBBHHH", 40000, UDP_PORT, number, 0, words << 4, syn, 64240, 0, 0) + token
        at = 16
    pseudo = b""
    if version == 6 or protocol != "icmp":
        pseudo = source + target + struct.pack("!II", len(body), _NUMBER[version][protocol])
    return body[:at] + struct.pack("!H", checksum(pseudo + body) or 0xFFFF) + body[at + 2 :]


def tcp_sender(packet: bytes) -> str | None:
    """Who sent this, if it is a TCP segment: answers to a SYN don't carry its token."""
    if len(packet) >= 40 and packet[0] >> 4 == 6 and packet[6] == 6:
        return str(ip_address(packet[8:24]))
    if len(packet) >= 20 and packet[0] >> 4 == 4 and packet[9] == 6:
        return str(ip_address(packet[12:16]))
    return None


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
