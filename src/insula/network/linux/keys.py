"""Keys of sets: conversion of elements, which are texts, to the kernel's bytes and back.

Each part of an element has a type, a letter: d is a device, m a MAC address, 4 and 6 an IP address, h 16 bytes in
hexadecimal, v the version of IP, p a protocol, s a port, n the number of a router.
"""

from __future__ import annotations

import sys
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final

from insula.kernel.netlink.nftables import IFNAME

NUMBER: Final = 4
_LENGTHS: Final = {"n": NUMBER, "d": IFNAME, "m": 8, "4": 4, "6": 16, "h": 16, "v": 1, "p": 4, "s": 4}
_VERSIONS: Final = {"ipv4": b"\2"}  # NFPROTO_IPV4
_PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58}


def packed(types: str, element: tuple[str, ...]) -> bytes:
    """Convert an element to a key."""
    return b"".join(_packed(kind, part) for kind, part in zip(types, element, strict=True))


def unpacked(types: str, key: bytes) -> tuple[str, ...]:
    """Convert a key to an element."""
    found, at = [], 0
    for kind in types:
        found.append(_text(kind, key[at : at + _LENGTHS[kind]]))
        at += _LENGTHS[kind]
    return tuple(found)


def _packed(kind: str, part: str) -> bytes:
    if kind == "d":
        return part.encode().ljust(IFNAME, b"\0")
    if kind == "m":
        return bytes.fromhex(part.replace(":", "")) + b"\0\0"
    if kind == "h":
        return int(part, 16).to_bytes(16, "big")
    if kind == "v":
        return _VERSIONS[part]
    if kind == "p":
        return bytes((_PROTOCOLS[part], 0, 0, 0))
    if kind == "n":
        return int(part).to_bytes(NUMBER, sys.byteorder)
    if kind == "s":
        return int(part).to_bytes(2, "big") + b"\0\0"
    return inet_pton(AF_INET if kind == "4" else AF_INET6, part)


def _text(kind: str, packed: bytes) -> str:
    if kind == "d":
        return packed.rstrip(b"\0").decode(errors="replace")
    if kind == "m":
        return packed[:6].hex(":")
    if kind == "h":
        return f"0x{packed.hex()}"
    if kind == "v":
        return next((name for name, value in _VERSIONS.items() if value == packed), packed.hex())
    if kind == "p":
        return next((name for name, number in _PROTOCOLS.items() if number == packed[0]), str(packed[0]))
    if kind == "n":
        return str(int.from_bytes(packed, sys.byteorder))
    if kind == "s":
        return str(int.from_bytes(packed[:2], "big"))
    return inet_ntop(AF_INET if kind == "4" else AF_INET6, packed)
