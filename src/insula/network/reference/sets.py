"""Sets of services that the reference model treats apart: those of gateways, of neighbor discovery, and usual ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

from insula.network.interpreter.space import ECHO, ICMP, ICMPV6, TCP, UDP, Service
from insula.network.ranges import contains
from insula.network.reference.expectation import NEIGHBOURS, is_usual
from insula.network.reference.host import RESOLVERS

DNS: Final = 53
CLIENTS: Final = {(68, 67), (546, 547)}
"""Source and destination ports of DHCP clients (RFC 2131, RFC 8415)."""
Gateway = Literal["own", "pinged", "none"]
"""What an address is to a network: its own gateway, one that only answers echo requests, or none."""


class ToRouter(NamedTuple):
    """Services that a router has to answer, and that it may."""

    required: int
    permitted: int


class ServiceSets:
    """Sets of services, as bits."""

    def __init__(self, version: int, services: Sequence[Service]) -> None:
        echo, icmp = ECHO[version], ICMP if version == 4 else ICMPV6
        self._resolvers = self.ignored = self.of_resolver = self._echo = self._near = self.usual = 0
        for number, each in enumerate(services):
            if version == 6 and each.is_icmp and each.target in [(n, n) for n in NEIGHBOURS]:
                self.ignored |= 1 << number  # unless it is from the same link (RFC 4861, section 7.1)
            self.usual |= is_usual(each, version) << number
            if each.protocol in ((TCP, TCP), (UDP, UDP)) and each.target == (DNS, DNS):
                self.of_resolver |= 1 << number
            elif each.has_ports and each.target and contains(RESOLVERS, each.target):
                self._resolvers |= 1 << number
            elif each.protocol == (icmp, icmp) and each.target == (echo, echo):
                self._echo |= 1 << number
            elif (version == 6 and each.is_icmp and each.target in [(n, n) for n in NEIGHBOURS]) or (
                each.source and each.target and (each.source.low, each.target.low) in CLIENTS
            ):
                self._near |= 1 << number

    def sets(self) -> Iterator[int]:
        """Yield all of these sets."""
        yield from (self._resolvers, self.ignored, self.of_resolver, self._echo, self._near, self.usual)

    def queries(self, named: int) -> int:
        """Return the services of DNS that are redirected for a source: all, if it has rules with names."""
        return self.of_resolver if named else 0

    def of_router(self, gateway: Gateway) -> ToRouter:
        """Return the services of a gateway, which answers echo requests, and its own network's DNS queries. Any address
        of the router may be asked by neighbor discovery and DHCP."""
        answered = {"own": self.of_resolver | self._echo, "pinged": self._echo, "none": 0}[gateway]
        further = self._resolvers if gateway == "own" else 0
        return ToRouter(answered & self.usual, answered | further | self._near)
