"""Addresses as arithmetic: subnets, allocation inside them, MAC addresses and IPv6 link-local addresses.

Nothing here knows who owns what: callers pass what is taken and commit the answer in a transaction of their own.
Every tenant may use any unicast range it likes, also the same as its neighbour, with the exceptions in `RESERVED`.

A MAC address of ours is locally administered (bit 1 of the first octet, IEEE 802): its second octet tells what it
belongs to, the other four carry the index of the object, so that two objects never get the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import chain, filterfalse, islice
from socket import AF_INET, AF_INET6, inet_ntop

from insula.model.errors import Conflict, Invalid
from insula.model.units import shorten

Subnet = IPv4Network | IPv6Network

OUTSIDE = "192.0.2.1"  # TEST-NET-1, RFC 5737: stands for the rest of the world when isolation is verified
OUTSIDE6 = "2001:db8::1"  # RFC 3849

RESERVED: dict[str, str] = {
    "0.0.0.0/8": "means this host (RFC 1122)",
    "127.0.0.0/8": "is loopback",
    "169.254.0.0/16": "is link-local",
    "192.0.2.0/24": "stands for the outside when isolation is verified (RFC 5737)",
    "224.0.0.0/3": "is multicast and reserved",
    "::/8": "is reserved (RFC 4291)",
    "2001:db8::/32": "stands for the outside when isolation is verified (RFC 3849)",
    "fe80::/10": "is link-local",
    "ff00::/8": "is multicast",
}
_RESERVED = [(ip_network(subnet), reason) for subnet, reason in RESERVED.items()]
_REMEMBERED = 1024
_SHORTEST = {4: 8, 6: 16}
_LONGEST = {4: 30, 6: 126}


def parse_subnet(text: str, version: int, *, reserved: Iterable[str] = ()) -> Subnet:
    """The network in CIDR notation, or `Invalid`: no such notation, host bits set, too small, too large, reserved.

    `reserved` are further ranges that no tenant may use, such as the one of the uplinks.
    """
    hint = "write an IPv4 network as in 10.0.0.0/24" if version == 4 else "write an IPv6 network as in fd00:1::/64"
    try:
        if not isinstance(text, str) or "/" not in text:
            raise ValueError
        subnet = ip_network(text, strict=False)
    except ValueError:
        raise Invalid(f"subnet {shorten(text)} is not a network in CIDR notation", hint) from None
    if subnet.version != version:
        raise Invalid(f"subnet {shorten(text)} is not an IPv{version} network", hint)
    if ip_address(text.partition("/")[0]) != subnet.network_address:
        raise Invalid(f"subnet {text} has host bits set", f"the network is {subnet}")
    if not _SHORTEST[version] <= subnet.prefixlen <= _LONGEST[version]:
        raise Invalid(
            f"subnet {subnet} is of no usable size", f"use a prefix of {_SHORTEST[version]} to {_LONGEST[version]} bits"
        )
    for other, reason in (*_RESERVED, *((ip_network(r), "is reserved on this cloud") for r in reserved)):
        if _overlap(subnet, other):
            raise Invalid(f"subnet {subnet} can't be used: {other} {reason}", "use another range, as in 10.0.0.0/8")
    return subnet


def check_disjoint(subnet: Subnet, others: Iterable[tuple[str, str | None]]) -> None:
    """Raise `Conflict` if `subnet` overlaps one of the tenant's `others`, given as (name of its network, subnet)."""
    for name, text in others:
        if text is not None and _overlap(subnet, other := ip_network(text)):
            raise Conflict(f"subnet {subnet} overlaps {other} of network {name}", "choose another range")


def gateway_of(subnet: Subnet) -> str:
    """The first address of the subnet, which the tenant's router has."""
    return str(subnet[1])


def allocate(subnet: Subnet, taken: Collection[str], wanted: str | None = None) -> str:
    """`wanted` if it may be given to a port, else the lowest free address of `subnet`.

    Raises `Invalid` if `wanted` is no usable address of the subnet, `Conflict` if it is taken or nothing is free.
    The network's own address, IPv4's broadcast address and the gateway are never given out.
    """
    if wanted is not None:
        return _check(subnet, taken, wanted)
    candidates = chain(_first(subnet), islice(_usable(subnet), _REMEMBERED, None))
    for text in filterfalse(taken.__contains__, candidates):  # a loop in C: there may be hundreds to pass over
        return text
    raise Conflict(f"subnet {subnet} has no free address", "remove instances or make a network with a larger subnet")


def _check(subnet: Subnet, taken: Collection[str], wanted: str) -> str:
    try:
        address = ip_address(wanted)
    except ValueError:
        raise Invalid(f"{shorten(wanted)} is not an IP address", f"use one of {subnet}") from None
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise Invalid(f"address {shorten(wanted)} has a scope", f"use one of {subnet}")
    if address.version != subnet.version or address not in subnet:
        raise Invalid(f"address {address} is outside subnet {subnet}", f"use one from {subnet[2]} up")
    if address == subnet[1]:
        raise Conflict(f"address {address} is the gateway of {subnet}", f"use one from {subnet[2]} up")
    if address == subnet.network_address or (address.version == 4 and address == subnet.broadcast_address):
        raise Invalid(f"address {address} names the whole subnet {subnet}", f"use one from {subnet[2]} up")
    if str(address) in taken:
        raise Conflict(f"address {address} is taken", "leave the address out to get a free one")
    return str(address)


@lru_cache(maxsize=64)
def _first(subnet: Subnet) -> tuple[str, ...]:
    """The lowest addresses, which nearly all that is asked for is among: as many as a bridge has ports."""
    return tuple(islice(_usable(subnet), _REMEMBERED))


def _usable(subnet: Subnet) -> Iterator[str]:
    last = int(subnet.broadcast_address) - (subnet.version == 4)
    numbers = range(int(subnet.network_address) + 2, last + 1)
    family, length = (AF_INET, 4) if subnet.version == 4 else (AF_INET6, 16)
    # ten times as fast as making addresses of them, and there may be thousands to look at
    return (inet_ntop(family, number.to_bytes(length, "big")) for number in numbers)


def _overlap(a: Subnet, b: Subnet) -> bool:
    if isinstance(a, IPv4Network):
        return isinstance(b, IPv4Network) and a.overlaps(b)
    return isinstance(b, IPv6Network) and a.overlaps(b)


# -- link layer ----------------------------------------------------------------------------------------------------


def port_mac(index: int) -> str:
    """The MAC address of the port with that index: 02:00 and 32 bits."""
    return _mac(0x00, index)


def gateway_mac(index: int) -> str:
    """The MAC address of the gateway of the network with that index."""
    return _mac(0x01, index)


def uplink_mac(index: int, *, host: bool) -> str:
    """The MAC address of the uplink of the tenant with that index, at the host's or at the tenant's end."""
    return _mac(0x02 if host else 0x03, index)


def _mac(kind: int, index: int) -> str:
    return ":".join(f"{octet:02x}" for octet in (0x02, kind, *index.to_bytes(4, "big")))


def link_local(mac: str) -> str:
    """The IPv6 link-local address that a host derives from its MAC address (modified EUI-64, RFC 4291 appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return str(IPv6Address(b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]))
