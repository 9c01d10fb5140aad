"""Packets: probes (ICMP echo, UDP and TCP SYN), and announcements of addresses.

A probe carries a token of 16 random bytes. Without having seen a probe an instance can't forge one with its token, and
a probe that an instance repeats is recognised by the port that it comes from. Probes have a DSCP that the host's rules
never forward, and a hop limit that expires one hop after the host, so a probe can't leave this machine even without
those rules.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

PROTOCOLS: Final = ("icmp", "udp", "tcp")
DSCP: Final = 0x3F  # of probes (RFC 2474, for local use)
HOPS: Final = 4  # instance → its router → host → another tenant's router → instance
SOURCE_PORT: Final = 40000
UDP_PORT: Final = 9  # discard, RFC 863
SERVICES: Final = {
    4: (("icmp", 8), ("udp", UDP_PORT), ("tcp", UDP_PORT)),
    6: (("icmpv6", 128), ("udp", UDP_PORT), ("tcp", UDP_PORT)),
}
"""The services that probes ask for, by IP version: protocol, and port or ICMP type."""
IP, ARP, IPV6 = 0x0800, 0x0806, 0x86DD  # if_ether.h
BROADCAST, ALL_NODES = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"
_NUMBER = {4: {"icmp": 1, "udp": 17, "tcp": 6}, 6: {"icmp": 58, "udp": 17, "tcp": 6}}
_MARK, _TOKEN = 8, 16
_HEADER6 = 40


@dataclass(frozen=True)
class Probe:
    """A probe. `sender` identifies the endpoint that it is sent for, `packet` is the whole IP packet."""

    sender: str
    address: str
    protocol: str
    packet: bytes = field(repr=False)

    def is_same(self, packet: bytes) -> bool:
        """Whether `packet` has this one's addresses, protocol and content, with any hop limit."""
        return _content(packet) == _content(self.packet)

    def is_to_same(self, packet: bytes) -> bool:
        """Whether `packet` has this one's protocol and destination; NAT may have changed its source."""
        one, two = _content(packet), _content(self.packet)
        half = 16 if packet[0] >> 4 == 6 else 4
        return one[0] == two[0] and one[1 + half : 1 + 2 * half] == two[1 + half : 1 + 2 * half]

    def is_answer(self, packet: bytes) -> bool:
        """Whether `packet` is the echo reply to this one, from its destination."""
        six = packet[0] >> 4 == 6
        kind = packet[_HEADER6 : _HEADER6 + 1] if six else packet[_length4(packet) : _length4(packet) + 1]
        return self.protocol == "icmp" and sender(packet) == self.address and kind == (b"\x81" if six else b"\0")


class ProbeCodec:
    """Make probes, and recognise them in received packets."""

    def __init__(self) -> None:
        self._mark = os.urandom(_MARK)
        self._made: dict[bytes, Probe] = {}

    def probe(
        self,
        sender: str,
        protocol: str,
        source: str,
        target: str,
        source_port: int = SOURCE_PORT,
        port: int = UDP_PORT,
    ) -> Probe:
        """Make a probe from one address to another, with a new token. Ports are those of UDP and TCP."""
        token = os.urandom(_TOKEN)
        made = Probe(
            sender, target, protocol, ip_packet(protocol, source, target, self._mark + token, (source_port, port))
        )
        self._made[token] = made
        return made

    def find(self, data: bytes) -> Probe | None:
        """Return the probe whose token is in `data`, None if there is none. Never raises, whatever `data` is."""
        at = data.find(self._mark) + _MARK
        return self._made.get(data[at : at + _TOKEN]) if at >= _MARK else None


def ip_packet(
    protocol: str, source: str, target: str, payload: bytes, ports: tuple[int, int] = (SOURCE_PORT, UDP_PORT)
) -> bytes:
    """Build an IPv4 or IPv6 packet with `DSCP` and `HOPS`. `ports` are those of source and destination."""
    version = 6 if ":" in target else 4
    sent, receiver = ip_address(source).packed, ip_address(target).packed
    upper = _upper(version, protocol, sent, receiver, payload, ports)
    if version == 6:
        first = 6 << 28 | DSCP << 22
        return struct.pack("!IHBB", first, len(upper), _NUMBER[6][protocol], HOPS) + sent + receiver + upper
    head = struct.pack("!BBHHHBBH", 0x45, DSCP << 2, 20 + len(upper), 0, 0, HOPS, _NUMBER[4][protocol], 0)
    head += sent + receiver
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + upper


def _upper(version: int, protocol: str, source: bytes, target: bytes, payload: bytes, ports: tuple[int, int]) -> bytes:
    if protocol == "icmp":
        body, at = struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, 9, 1) + payload, 2
    elif protocol == "udp":
        body, at = struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload, 6
    else:
        syn, words = 2, 5
        body = struct.pack("!HHIIBBHHH", *ports, 1, 0, words << 4, syn, 64240, 0, 0) + payload
        at = 16
    pseudo = b""
    if version == 6 or protocol != "icmp":
        pseudo = source + target + struct.pack("!II", len(body), _NUMBER[version][protocol])
    return body[:at] + struct.pack("!H", checksum(pseudo + body) or 0xFFFF) + body[at + 2 :]


# -- reading -------------------------------------------------------------------------------------------------------


def sender(packet: bytes) -> str | None:
    """Return the source address of an IP packet; None if it is too short, or neither IPv4 nor IPv6."""
    if len(packet) > _HEADER6 and packet[0] >> 4 == 6:
        return str(ip_address(packet[8:24]))
    if packet and packet[0] >> 4 == 4 and len(packet) > _length4(packet) >= 20:
        return str(ip_address(packet[12:16]))
    return None


def is_tcp(packet: bytes) -> bool:
    """Whether an IP packet is a TCP segment: replies to a SYN don't carry its token."""
    return sender(packet) is not None and (packet[6] if packet[0] >> 4 == 6 else packet[9]) == _NUMBER[4]["tcp"]


def _content(packet: bytes) -> bytes:
    """Return protocol, addresses and payload."""
    if packet[0] >> 4 == 6:
        return packet[6:7] + packet[8:]
    return packet[9:10] + packet[12:20] + packet[_length4(packet) :]


def _length4(packet: bytes) -> int:
    return (packet[0] & 15) * 4


# -- frames --------------------------------------------------------------------------------------------------------


def frame(target: str, source: str, packet: bytes, kind: int | None = None) -> bytes:
    """Build an Ethernet frame with an IP packet, or with a payload of the EtherType `kind`."""
    kind = kind or (IPV6 if packet[0] >> 4 == 6 else IP)
    return _octets(target) + _octets(source) + struct.pack("!H", kind) + packet


def announcement(mac: str, address: str) -> bytes:
    """Build a frame that updates the MAC address of an IP address in all neighbours' tables.

    For IPv4 it is a gratuitous ARP request (RFC 5227, section 3), for IPv6 an unsolicited neighbor advertisement with
    the override flag (RFC 4861, section 7.2.6).
    """
    here, hardware = ip_address(address).packed, _octets(mac)
    if len(here) == 4:
        request = struct.pack("!HHBBH", 1, IP, 6, 4, 1) + hardware + here + bytes(6) + here
        return frame(BROADCAST, mac, request, ARP)
    override, target_link_layer = 0x20000000, b"\x02\x01"
    all_nodes = ip_address("ff02::1").packed
    body = struct.pack("!BBHI", 136, 0, 0, override) + here + target_link_layer + hardware
    pseudo = here + all_nodes + struct.pack("!II", len(body), 58)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    head = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + here + all_nodes
    return frame(ALL_NODES, mac, head + body)


def _octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def checksum(data: bytes) -> int:
    """Return the internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
