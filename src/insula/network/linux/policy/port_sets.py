"""Sets of protocols and ports, as rules of policies name them, in one canonical form.

A set is EVERYTHING, or has for each protocol its intervals of ports. The port of an ICMP request is its type and code,
as in conntrack's tuples: a type of the rules is that type with code 0, which all requests have that begin a connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from insula.model.policies import PortMatch

PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58}
"""The protocols with ports or types, by their numbers (IANA)."""
LAST: Final = 65535


class PortInterval(NamedTuple):
    """The ports from `first` to `last` of a protocol."""

    protocol: int
    first: int
    last: int

    @property
    def is_all(self) -> bool:
        return (self.first, self.last) == (0, LAST)


PortSet = tuple[PortInterval, ...]
"""Disjoint intervals in order, none of which touches another of its protocol."""
EVERYTHING: Final[PortSet] = (PortInterval(256, 0, LAST),)
"""All packets, of any protocol; 256 is no protocol's number."""


def port_set(matches: Iterable[PortMatch]) -> PortSet:
    """Return the set of a rule's ports; none is EVERYTHING."""
    found = [interval for match in matches for interval in _intervals(match)]
    return _canonical(found) if found else EVERYTHING


def union(sets: Iterable[PortSet]) -> PortSet:
    """Return the union of sets."""
    listed = [*sets]
    if len(listed) == 1:
        return listed[0]
    return EVERYTHING if EVERYTHING in listed else _canonical(interval for each in listed for interval in each)


def text_of(ports: PortSet) -> str:
    """Return a text that no other set has."""
    return ",".join(f"{protocol}/{first}-{last}" for protocol, first, last in ports)


def _intervals(match: PortMatch) -> Iterable[PortInterval]:
    number = PROTOCOLS[match.protocol]
    if match.protocol in ("icmp", "icmpv6"):
        if match.icmp_type is not None:
            yield PortInterval(number, match.icmp_type << 8, match.icmp_type << 8)
            return
        yield PortInterval(number, 0, LAST)
        if match.protocol == "icmp":
            yield PortInterval(PROTOCOLS["icmpv6"], 0, LAST)
    elif match.port is None:
        yield PortInterval(number, 0, LAST)
    else:
        yield PortInterval(number, match.port, match.end_port or match.port)


def _canonical(intervals: Iterable[PortInterval]) -> PortSet:
    found: list[PortInterval] = []
    for each in sorted(intervals):
        if found and found[-1].protocol == each.protocol and each.first <= found[-1].last + 1:
            found[-1] = PortInterval(each.protocol, found[-1].first, max(found[-1].last, each.last))
        else:
            found.append(each)
    return tuple(found)
