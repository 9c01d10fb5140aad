"""The part of the reference model about published ports: to which instance packets may come in addition.

The intent does not tell which addresses the host has, so a port that is published on all of them is one on every
address that none of the tenant's networks has. Nothing is required: whether a packet comes depends on these addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from insula.model.objects import Port, PublishedPort
from insula.network.intent import TenantIntent
from insula.network.interpreter.space import TCP, UDP, Boundaries, Service

_PROTOCOLS = {"tcp": TCP, "udp": UDP}


def published(intent: TenantIntent, version: int) -> Iterator[tuple[PublishedPort, Port]]:
    """Yield the published ports of an IP version, with the ports of instances that they lead to."""
    for forward in intent.outside.forwards:
        for port in intent.ports:
            address = port.address if version == 4 else port.address6
            if address is not None and address in forward.addresses:
                yield forward.published, port


def cut(ports: Iterable[PublishedPort], into: Boundaries) -> None:
    """Add the boundaries of published ports, outside and inside."""
    for each in ports:
        targets = into.targets[_PROTOCOLS[each.protocol]]
        targets.add(each.port, each.last)
        targets.add(each.target, each.target + each.count - 1)


def classes(port: PublishedPort, services: Sequence[Service]) -> int:
    """Return the classes of packets to a published port."""
    protocol = _PROTOCOLS[port.protocol]
    found = 0
    for number, service in enumerate(services):
        mine = service.protocol == (protocol, protocol) and service.target is not None
        if mine and service.target and port.port <= service.target.low and service.target.high <= port.last:
            found |= 1 << number
    return found
