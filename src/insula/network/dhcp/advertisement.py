"""Router advertisements (RFC 4861): the gateway, MTU, prefix and resolver of a network.

Addresses come by DHCPv6 (the flag M), because an instance may send from those of its port only. So the prefix is said
to be on the link, and not for addresses that hosts make themselves.
"""

from __future__ import annotations

import struct
from ipaddress import IPv6Address, IPv6Network
from typing import Final

from insula.network.dhcp.frames import domain_name

ALL_NODES, ALL_NODES_MAC = "ff02::1", "33:33:00:00:00:01"
EVERY: Final = 600.0
"""Seconds between advertisements that nobody asked for."""
LIFETIME: Final = 65535
"""Seconds for which the gateway is a default router, if none follows (RFC 8319)."""
_SOLICITATION, _ADVERTISEMENT = 133, 134
_MANAGED_AND_OTHER, _ON_LINK = 0xC0, 0x80
_HOPS, _FOREVER = 64, 0xFFFFFFFF


def is_solicitation(message: bytes) -> bool:
    """Whether an ICMPv6 message is a router solicitation."""
    return len(message) >= 8 and message[:2] == bytes([_SOLICITATION, 0])


def advertisement(mac: str, mtu: int, subnet6: str, gateway6: str, domain: str) -> bytes:
    """Build the message; `mac` is that of the gateway. The checksum is 0."""
    subnet = IPv6Network(subnet6)
    head = struct.pack("!BBHBBHII", _ADVERTISEMENT, 0, 0, _HOPS, _MANAGED_AND_OTHER, LIFETIME, 0, 0)
    prefix = struct.pack("!BBIII", subnet.prefixlen, _ON_LINK, _FOREVER, _FOREVER, 0) + subnet.network_address.packed
    return head + b"".join(
        (
            _option(1, bytes.fromhex(mac.replace(":", ""))),
            _option(5, struct.pack("!HI", 0, mtu)),
            _option(3, prefix),
            _option(25, struct.pack("!HI", 0, LIFETIME) + IPv6Address(gateway6).packed),  # RFC 8106
            _option(31, struct.pack("!HI", 0, LIFETIME) + domain_name(domain)),
        )
    )


def _option(kind: int, value: bytes) -> bytes:
    """Pack an option, whose length is counted in eight bytes."""
    value += bytes(-(len(value) + 2) % 8)
    return bytes([kind, (len(value) + 2) // 8]) + value
