"""The operator's pool of external addresses, from which tenants get floating ones. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from insula.model.errors import Conflict, Invalid
from insula.model.units import shorten
from insula.network.addresses import Subnet

_HINT = "the operator sets network.floating in insulad.toml"


def choose(ranges: Iterable[str], taken: Collection[str], version: int) -> str:
    """Return the lowest free address of a version. `taken` are those of tenants and of the host. Invalid, Conflict."""
    own = [each for each in map(ip_network, ranges) if each.version == version]
    if not own:
        raise Invalid(f"the pool has no IPv{version} addresses", _HINT)
    kind = IPv4Address if version == 4 else IPv6Address
    for subnet in own:
        first, last = _usable(subnet)
        for number in range(first, last + 1):
            if (text := str(kind(number))) not in taken:
                return text
    raise Conflict(f"all IPv{version} addresses of the pool are in use", f"release some, or {_HINT}")


def check(ranges: Sequence[str], taken: Collection[str], wanted: str) -> str:
    """Return the address in canonical form. Invalid if it is not of the pool, Conflict if it is taken."""
    try:
        address = ip_address(wanted)
    except ValueError:
        raise Invalid(f"{shorten(wanted)} is no IP address", "as in 203.0.113.7") from None
    for subnet in map(ip_network, ranges):
        first, last = _usable(subnet)
        if address.version == subnet.version and "%" not in wanted and first <= int(address) <= last:
            if str(address) in taken:
                raise Conflict(f"address {address} is taken", "leave it out to get a free one")
            return str(address)
    raise Invalid(f"{shorten(wanted)} is not in the pool", f"it has {', '.join(ranges) or 'no addresses'}; {_HINT}")


def _skipped(subnet: Subnet) -> int:
    """How many addresses at the start name the whole subnet: one, if it has more than two (RFC 3021, RFC 6164)."""
    return 1 if subnet.num_addresses > 2 else 0


def _usable(subnet: Subnet) -> tuple[int, int]:
    """Return the first and the last usable address as numbers."""
    skipped = _skipped(subnet)
    last = int(subnet.broadcast_address) - (skipped if subnet.version == 4 else 0)
    return int(subnet.network_address) + skipped, last
