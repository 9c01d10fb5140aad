"""Arithmetic on addresses: subnets, allocation inside them, MAC addresses and IPv6 link-local addresses.

All functions are pure: callers pass the addresses in use, and commit the result in a transaction of their own. A tenant
may use any unicast range except those in `RESERVED`, also one that another tenant uses.

The MAC addresses are locally administered (bit 1 of the first octet, IEEE 802); the second octet is the kind of owner.
Those of gateways and uplinks contain the index of the object. That of a port is computed from its network and IP
address, so a port that gets the address of an earlier one has the same MAC address, and entries in the neighbour tables
of others stay valid.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator
from hashlib import blake2b
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import chain, filterfalse
from socket import AF_INET, AF_INET6, inet_ntop

from insula.model.errors import Conflict, Invalid
from insula.model.rules import MAC
from insula.model.units import shorten

Subnet = IPv4Network | IPv6Network

OUTSIDE = "192.0.2.1"  # TEST-NET-1, RFC 5737: represents the outside when isolation is verified
OUTSIDE6 = "2001:db8::1"  # RFC 3849

RESERVED: dict[str, str] = {
    "0.0.0.0/8": "means this host (RFC 1122)",
    "127.0.0.0/8": "is loopback",
    "169.254.0.0/16": "is link-local",
    "192.0.2.0/24": "represents the outside when isolation is verified (RFC 5737)",
    "224.0.0.0/3": "is multicast and reserved",
    "::/8": "is reserved (RFC 4291)",
    "2001:db8::/32": "represents the outside when isolation is verified (RFC 3849)",
    "fe80::/10": "is link-local",
    "ff00::/8": "is multicast",
}
_RESERVED = [(ip_network(subnet), reason) for subnet, reason in RESERVED.items()]
_MAC = re.compile(MAC)
_SHORTEST = {4: 8, 6: 16}
_LONGEST = {4: 30, 6: 126}


def parse_subnet(text: str, version: int, *, reserved: Iterable[str] = ()) -> Subnet:
    """Parse a subnet in CIDR notation. `Invalid` if it is malformed, has host bits, a bad size, or is reserved.

    `reserved` are further ranges that no tenant may use: those of the uplinks.
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
            f"subnet {subnet} has an unsupported size",
            f"use a prefix of {_SHORTEST[version]} to {_LONGEST[version]} bits",
        )
    for other, reason in (*_RESERVED, *((ip_network(r), "is used for this host's uplinks") for r in reserved)):
        if _overlap(subnet, other):
            raise Invalid(f"subnet {subnet} can't be used: {other} {reason}", "use another range, as in 10.0.0.0/8")
    return subnet


def parse_range(text: str, *, reserved: Iterable[str] = ()) -> str:
    """Parse an address, or a range in CIDR notation, of an allowed address pair; returns it in canonical form, an
    address without its length. `Invalid` if it is malformed, has host bits, or overlaps what no port may send from.

    `reserved` are further ranges: those of the uplinks.
    """
    try:
        found = ip_network(text, strict=False)
        if ip_address(text.partition("/")[0]) != found.network_address or "%" in text:
            raise ValueError
    except ValueError:
        what = f"{shorten(text)} is neither an address nor a range in CIDR notation"
        raise Invalid(what, "as in 10.0.0.100 or 10.9.0.0/16") from None
    for other, reason in (*_RESERVED, *((ip_network(r), "is used for this host's uplinks") for r in reserved)):
        if _overlap(found, other):
            raise Invalid(f"address pair {found} can't be allowed: {other} {reason}", "use other addresses")
    return str(found.network_address) if found.prefixlen == found.max_prefixlen else str(found)


def check_disjoint(subnet: Subnet, others: Iterable[tuple[str, str | None]]) -> None:
    """Raise `Conflict` if `subnet` overlaps one of the tenant's `others`, given as (name of its network, subnet)."""
    for name, text in others:
        if text is not None and _overlap(subnet, other := ip_network(text)):
            raise Conflict(f"subnet {subnet} overlaps {other} of network {name}", "choose another range")


def gateway_of(subnet: Subnet) -> str:
    """Return the first address of the subnet, that of the tenant's router."""
    return str(subnet[1])


def allocate(subnet: Subnet, taken: Collection[str], wanted: str | None = None, after: str | None = None) -> str:
    """Choose an address for a port: `wanted`, or without it the first free address of `subnet` that follows `after`.

    The search wraps around at the end of the subnet, so a released address is the last to be allocated again. The
    network's own address, IPv4's broadcast address and the gateway are never allocated.

    `Invalid` if `wanted` is not a usable address of the subnet, `Conflict` if it is in use or no address is free.
    """
    if wanted is not None:
        return _check(subnet, taken, wanted)
    # filterfalse runs in C: hundreds of addresses may be in use
    for text in filterfalse(taken.__contains__, _usable(subnet, after)):
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


def _usable(subnet: Subnet, after: str | None) -> Iterator[str]:
    """Yield all addresses that a port may have, from the one after `after` to the end, then from the start."""
    first, end = int(subnet.network_address) + 2, int(subnet.broadcast_address) + (subnet.version == 6)
    start = min(max(first, int(ip_address(after)) + 1), end) if after else first
    numbers = chain(range(start, end), range(first, start))
    family, length = (AF_INET, 4) if subnet.version == 4 else (AF_INET6, 16)
    # ten times as fast as address objects, and there may be thousands
    return (inet_ntop(family, number.to_bytes(length, "big")) for number in numbers)


def _overlap(a: Subnet, b: Subnet) -> bool:
    if isinstance(a, IPv4Network):
        return isinstance(b, IPv4Network) and a.overlaps(b)
    return isinstance(b, IPv6Network) and a.overlaps(b)


# -- link layer ----------------------------------------------------------------------------------------------------


def port_mac(network: str, address: str, attempt: int = 0) -> str:
    """Compute the MAC address for an address on a network: 02:10 to 02:ff, and 32 bits of a hash.

    `network` is unique for each network. If the MAC address is in use, the next `attempt` gives another.
    """
    digest = blake2b(f"{network}/{address}/{attempt}".encode(), digest_size=5).digest()
    return _mac(0x10 + digest[0] % 0xF0, int.from_bytes(digest[1:], "big"))


def parse_mac(text: str) -> str:
    """Parse a MAC address for a port; returns it in lower case with colons.

    `Invalid` if it is malformed, a group address (IEEE 802), or in the range of gateways and uplinks.
    """
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise Invalid(f"{shorten(text)} is not a MAC address", "write six octets, as in 02:42:ac:11:00:02")
    if int(mac[:2], 16) & 1:
        raise Invalid(f"MAC address {mac} is a group address", "the first octet must be even, as in 02:42:ac:11:00:02")
    if mac == "00:00:00:00:00:00" or mac[:5] in ("02:00", "02:01", "02:02", "02:03"):
        raise Invalid(f"MAC address {mac} is reserved", "use another, as in 02:42:ac:11:00:02")
    return mac


def gateway_mac(index: int) -> str:
    """Return the MAC address of the gateway of the network with that index."""
    return _mac(0x01, index)


def uplink_mac(index: int, *, host: bool) -> str:
    """Return the MAC address of the host's or the tenant's end of the uplink of the tenant with that index."""
    return _mac(0x02 if host else 0x03, index)


def peering_mac(index: int, *, first: bool) -> str:
    """Return the MAC address of the first or second end of the peering with that index."""
    return _mac(0x00, 2 * index + first)


def host_mac(underlay: str) -> str:
    """Return the MAC address of a host's ends of peerings with other hosts, from its underlay address. Those of two
    IPv6 addresses may be equal: they are 40 bits of a hash."""
    if ":" not in underlay:
        return _mac(0x04, int(IPv4Address(underlay)))
    return ":".join(f"{octet:02x}" for octet in (0x06, *blake2b(underlay.encode(), digest_size=5).digest()))


def _mac(kind: int, index: int) -> str:
    return ":".join(f"{octet:02x}" for octet in (0x02, kind, *index.to_bytes(4, "big")))


def mac_of(address: str) -> str | None:
    """Return the MAC address of which `link_local` makes this address; None if there is none."""
    packed = IPv6Address(address).packed
    octets = bytes([packed[8] ^ 2]) + packed[9:11] + packed[13:]
    return octets.hex(":") if packed[:8] == b"\xfe\x80" + bytes(6) and packed[11:13] == b"\xff\xfe" else None


@functools.lru_cache(maxsize=8192)
def link_local(mac: str) -> str:
    """Return the IPv6 link-local address for a MAC address (modified EUI-64, RFC 4291 appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return str(IPv6Address(b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]))
