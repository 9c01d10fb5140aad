"""The reference model of the host between tenants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from insula.network.fabric import Entries
from insula.network.intent import TenantIntent
from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import TCP, UDP, Boundaries, NumberRange, Service, Space
from insula.network.ranges import contains, number_of
from insula.network.reference.expectation import Expectation, is_usual
from insula.network.reference.outside import OutsideReference, at_hosts_of
from insula.network.reference.ranges import Outside

RESOLVERS: Final = NumberRange(5300, 5399)
"""Ports at which a fabric may have further resolvers, which answer fewer questions."""


class HostReference:
    """The host forwards from each tenant to the outside, and to what the `intents` offer to the outside, and nothing
    else. `entries` are the fabric's addresses of tenants, by name.

    Tenants' resolvers ask the host's name servers, which are outside, at ports of the host's end of their uplink.
    """

    def __init__(
        self,
        version: int,
        reserved: Iterable[str],
        intents: Sequence[TenantIntent] = (),
        entries: Mapping[str, Entries] | None = None,
    ) -> None:
        self.version = version
        known = entries or {}
        self._doors = [OutsideReference(i, version, known.get(i.tenant.name, Entries())) for i in intents]
        self._outside = Outside(version, reserved)
        self._hosts = {number_of(h) for e in known.values() for h in e.hosts if (":" in h) == (version == 6)}

    def cut(self, into: Boundaries) -> None:
        """Add the boundaries of what is outside, and of the ports that stand for name servers."""
        self._outside.cut(into)
        for protocol in (TCP, UDP):
            into.targets[protocol].add(*RESOLVERS)
        for each in self._doors:
            each.cut(into)
        into.tells.append(self._told)

    def _told(self, services: Sequence[Service]) -> Iterator[int]:
        """Yield the sets of services that this model tells from others."""
        yield sum(1 << n for n, each in enumerate(services) if is_usual(each, self.version))
        yield sum(1 << n for n, each in enumerate(services) if _is_to_name_server(each))
        for each in self._doors:
            yield from each.told(services)

    def of_uplinks(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets of tenants should reach. Those with another address than their uplink's need reach
        nothing."""
        found = Expectation(ignored=self._outside.without_promise(space))
        usual = sum(1 << n for n, each in enumerate(space.services) if is_usual(each, self.version))
        servers = sum(1 << n for n, each in enumerate(space.services) if _is_to_name_server(each))
        for target, range_ in enumerate(space.targets):
            required = self._outside.has(range_) and not self._outside.may_be_closed(range_)
            offered = self._offered(range_, space.services)
            elsewhere = sum_of(offered.values())
            for number, sender in enumerate(senders):
                cell = space.cell(number, target)
                outside = servers if self._outside.is_reserved(range_) else (1 << len(space.services)) - 1
                found.permit(NetworkPlace("outside"), outside << cell)
                if sender.address is not None and required:
                    found.require(NetworkPlace("outside"), (usual & ~elsewhere) << cell)
                for place, services in offered.items():
                    found.permit(place, services << cell)
                    routed = range_.low in self._hosts or not place.address
                    if sender.address is not None and place.name != sender.place.name and routed:
                        found.require(place, (services & usual) << cell)
        return found

    def of_others(self, space: Space) -> Expectation:
        """Return what packets of others should reach: what tenants offer; else the host does as it likes."""
        found = Expectation(ignored=self._outside.without_promise(space))
        usual = sum(1 << n for n, each in enumerate(space.services) if is_usual(each, self.version))
        for place in (NetworkPlace("host"), NetworkPlace("outside")):
            found.permit(place, space.all)
        for target, range_ in enumerate(space.targets):
            for place, services in self._offered(range_, space.services).items():
                found.permit(place, services << space.cell(0, target))
                if range_.low in self._hosts or not place.address:
                    found.require(place, (services & usual) << space.cell(0, target))
        return found

    def _offered(self, range_: NumberRange, services: Sequence[Service]) -> dict[NetworkPlace, int]:
        """Return what tenants offer at these addresses: floating ones are routed to them, others translated."""
        found: dict[NetworkPlace, int] = {}
        for (tenant, address), some in at_hosts_of(self._doors, range_, services).items():
            found[NetworkPlace("tenant", tenant, address)] = some
        for each in self._doors:
            if any(range_ == (number_of(address), number_of(address)) for address in each.floating):
                found[NetworkPlace("tenant", each.tenant)] = (1 << len(services)) - 1
        return found


def sum_of(sets: Iterable[int]) -> int:
    """Return the union of sets of services."""
    found = 0
    for each in sets:
        found |= each
    return found


def _is_to_name_server(service: Service) -> bool:
    """Whether a service is one of the ports that stand for the host's name servers."""
    is_dns = service.protocol in ((TCP, TCP), (UDP, UDP))
    return is_dns and service.target is not None and contains(RESOLVERS, service.target)
