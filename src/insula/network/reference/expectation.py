"""What a reference model expects of packet classes: where they have to come, and where they may."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from insula.network.interpreter.delivery import NetworkPlace
from insula.network.interpreter.space import ECHO, ICMPV6, TCP, UDP, Service

SERVERS: Final = {4: 67, 6: 547}
"""Source ports of DHCP servers, which instances may not use."""
NEIGHBOURS: Final = (133, 135, 136)
"""ICMPv6 types of neighbor discovery that hosts send (RFC 4861)."""


@dataclass
class Expectation:
    """The classes that should come to each place (`required`), and those that may (`permitted`)."""

    required: dict[NetworkPlace, int] = field(default_factory=dict)
    permitted: dict[NetworkPlace, int] = field(default_factory=dict)
    ignored: int = 0
    """Classes that nothing is promised about: multicast and broadcast."""

    def require(self, place: NetworkPlace, classes: int) -> None:
        self.required[place] = self.required.get(place, 0) | classes
        self.permit(place, classes)

    def permit(self, place: NetworkPlace, classes: int) -> None:
        self.permitted[place] = self.permitted.get(place, 0) | classes

    def excuse(self, classes: int) -> None:
        """Require nothing for these classes."""
        self.required = {place: required & ~classes for place, required in self.required.items()}


def is_usual(service: Service, version: int) -> bool:
    """Whether a service is one that fabrics have to carry: TCP, UDP, and ICMP echo."""
    if service.protocol == (TCP, TCP):
        return True
    if service.protocol == (UDP, UDP):
        return service.source is not None and not service.source.low <= SERVERS[version] <= service.source.high
    echo = ECHO[version]
    return service.is_icmp and service.target == (echo, echo) and service.code is not None and service.code.low == 0


def is_untracked(service: Service) -> bool:
    """Whether a service is neighbor discovery (RFC 4861), which belongs to no connection."""
    return service.protocol == (ICMPV6, ICMPV6) and service.target in [(each, each) for each in NEIGHBOURS]
