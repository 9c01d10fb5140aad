"""Builds Ethernet frames byte by byte, valid and forged."""

from __future__ import annotations

import struct
from ipaddress import ip_address

from insula.network.packets import checksum

BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL_NODES = "ff02::1"


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(target: str, source: str, kind: int, payload: bytes) -> bytes:
    return mac(target) + mac(source) + struct.pack("!H", kind) + payload


def arp(operation: int, source_mac: str, source: str, target_mac: str, target: str) -> bytes:
    """RFC 826; 1 is a request, 2 a reply."""
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    return head + mac(source_mac) + ip_address(source).packed + mac(target_mac) + ip_address(target).packed


def udp(source: str, target: str, payload: bytes, sport: int = 40000, dport: int = 9) -> bytes:
    """An IPv4 or IPv6 packet with a UDP datagram."""
    length = 8 + len(payload)
    sender, receiver = ip_address(source).packed, ip_address(target).packed
    datagram = struct.pack("!HHHH", sport, dport, length, 0) + payload
    total = checksum(sender + receiver + struct.pack("!II", length, 17) + datagram)
    datagram = datagram[:6] + struct.pack("!H", total or 0xFFFF) + datagram[8:]
    if len(sender) == 16:
        return ipv6(source, target, 17, datagram)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0) + sender + receiver
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + datagram


def igmp(source: str, mark: bytes) -> bytes:
    """An IPv4 packet with a membership report (RFC 3376), to all routers that listen for these."""
    report = struct.pack("!BBHHH", 0x22, 0, 0, 0, 0) + mark
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(report), 0, 0, 1, 2, 0)
    head += ip_address(source).packed + ip_address("224.0.0.22").packed
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + report


def ipv6(source: str, target: str, following: int, payload: bytes) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(payload), following, 255)
    return head + ip_address(source).packed + ip_address(target).packed + payload


def icmpv6(source: str, target: str, kind: int, body: bytes, *, hop_by_hop: bool = False) -> bytes:
    """An ICMPv6 packet (RFC 4443); with an extension header in front to bypass filters."""
    message = struct.pack("!BBH", kind, 0, 0) + body
    pseudo = ip_address(source).packed + ip_address(target).packed + struct.pack("!II", len(message), 58)
    message = message[:2] + struct.pack("!H", checksum(pseudo + message)) + message[4:]
    if hop_by_hop:
        return ipv6(source, target, 0, struct.pack("!BB", 58, 0) + b"\x01\x04\0\0\0\0" + message)
    return ipv6(source, target, 58, message)


def message6(source: str, target: str, kind: int, body: bytes) -> bytes:
    """An ICMPv6 message alone, with the right checksum."""
    return icmpv6(source, target, kind, body)[40:]


def fragment(source: str, target: str, following: int, payload: bytes, *, offset: int, more: bool) -> bytes:
    """An IPv6 packet with a fragment header (RFC 8200, section 4.5); `offset` in units of eight bytes."""
    return ipv6(source, target, 44, struct.pack("!BBHI", following, 0, offset << 3 | more, 7) + payload)


def authenticated(source: str, target: str, following: int, payload: bytes) -> bytes:
    """An IPv6 packet with an authentication header (RFC 4302) that no receiver checks."""
    return ipv6(source, target, 51, struct.pack("!BBHII", following, 1, 0, 1, 1) + payload)


def solicitation(source: str, target: str, about: str, mark: bytes, options: bytes = b"") -> bytes:
    """An NDP neighbor solicitation for this address (RFC 4861), with a mark of four bytes where nothing is used."""
    return icmpv6(source, target, 135, mark[:4] + ip_address(about).packed + options)


def advertisement(source: str, target: str, about: str, mark: bytes, options: bytes = b"") -> bytes:
    """NDP: I have this address. The mark is where flags are."""
    return icmpv6(source, target, 136, mark[:4] + ip_address(about).packed + options)


def option(kind: int, content: bytes) -> bytes:
    """An option of neighbor discovery of eight bytes."""
    return struct.pack("!BB", kind, 1) + content[:6].ljust(6, b"\0")


def router_advertisement(source: str, target: str, mark: bytes, *, hop_by_hop: bool = False) -> bytes:
    """NDP: I am your router."""
    body = struct.pack("!BBHII", 64, 0, 1800, 0, 0) + option(253, mark)
    return icmpv6(source, target, 134, body, hop_by_hop=hop_by_hop)


def syn(source: str, target: str, sport: int, dport: int, sequence: int = 1) -> bytes:
    """An IPv4 or IPv6 packet with a TCP segment that opens a connection (RFC 9293)."""
    segment = struct.pack("!HHIIBBHHH", sport, dport, sequence, 0, 5 << 4, 2, 64240, 0, 0)
    sender, receiver = ip_address(source).packed, ip_address(target).packed
    total = checksum(sender + receiver + struct.pack("!II", len(segment), 6) + segment)
    segment = segment[:16] + struct.pack("!H", total) + segment[18:]
    if len(sender) == 16:
        return ipv6(source, target, 6, segment)
    return ipv4(source, target, 6, segment)


def ipv4(source: str, target: str, protocol: int, payload: bytes, *, offset: int = 0, more: bool = False) -> bytes:
    """An IPv4 packet, or a fragment of one; `offset` in units of eight bytes."""
    flags = more << 13 | offset
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, flags, 64, protocol, 0)
    head += ip_address(source).packed + ip_address(target).packed
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload
