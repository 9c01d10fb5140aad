"""Which addresses a name outside may lead to: those of the internet, and no others.

Whoever runs a name's servers chooses the addresses in their answers. An address of the tenant's network, of the host or
of a metadata service would let them use an instance's rule to reach what the rule never meant (DNS rebinding). IPv6
addresses that carry an IPv4 address (NAT64, 6to4, Teredo, mapped) are judged by that address as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

_NEVER: Final = [
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # this host (RFC 1122)
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # shared by carriers (RFC 6598); uplinks
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # metadata: Azure
        "169.254.0.0/16",  # link-local (RFC 3927); metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments (RFC 6890); metadata: Oracle
        "192.0.2.0/24",  # documentation (RFC 5737)
        "192.88.99.0/24",  # 6to4 relays (RFC 7526)
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks (RFC 2544)
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
        "::/8",  # unspecified, loopback, mapped (RFC 4291)
        "64:ff9b:1::/48",  # NAT64 of a site (RFC 8215)
        "100::/64",  # discarded (RFC 6666)
        "2001:db8::/32",  # documentation (RFC 3849)
        "3fff::/20",  # documentation (RFC 9637)
        "5f00::/16",  # segment routing (RFC 9602)
        "fc00::/7",  # unique local (RFC 4193); metadata: AWS, Google
        "fe80::/9",  # link-local, site-local
        "ff00::/8",  # multicast
    )
]
_LONGEST: Final = 45  # characters of an address: an unfriendly caller must not fill memory
_NAT64: Final = IPv6Network("64:ff9b::/96")  # RFC 6052
_6TO4: Final = IPv6Network("2002::/16")
_TEREDO: Final = IPv6Network("2001::/32")
_ISATAP: Final = (0x00005EFE, 0x02005EFE)  # RFC 5214: the third quarter of an address


def is_public(address: str, own: tuple[str, ...] = ()) -> bool:
    """Whether a name may lead to this address, written as ipaddress does; `own` are further ranges that none may lead
    to."""
    return len(address) <= _LONGEST and _is_public(address, own)


@lru_cache(maxsize=4096)
def _is_public(address: str, own: tuple[str, ...]) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if str(parsed) != address or "%" in address:
        return False
    ours = [_network(text) for text in own]
    return not any(
        one in range_
        for one in _carried(parsed)
        for range_ in (ours if one in _NAT64 else (*_NEVER, *ours))  # NAT64 is judged by the address that it carries
        if range_.version == one.version
    )


def within(address: str, ranges: Iterable[str]) -> bool:
    """Whether an address is in one of these ranges."""
    one = ip_address(address)
    return any(one in range_ for range_ in map(_network, ranges) if range_.version == one.version)


@lru_cache(maxsize=4096)
def _network(text: str) -> IPv4Network | IPv6Network:
    return ip_network(text, strict=False)


def _carried(address: IPv4Address | IPv6Address) -> Iterator[IPv4Address | IPv6Address]:
    """Yield an address, and the IPv4 addresses that packets to it may end at."""
    yield address
    if isinstance(address, IPv4Address):
        return
    if address in _NAT64 or int(address) >> 32 & 0xFFFFFFFF in _ISATAP:
        yield IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _6TO4:
        yield IPv4Address(int(address) >> 80 & 0xFFFFFFFF)
    if address in _TEREDO:
        yield IPv4Address(int(address) >> 64 & 0xFFFFFFFF)
        yield IPv4Address(~int(address) & 0xFFFFFFFF)
