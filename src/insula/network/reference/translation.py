"""The part of the reference model about packets that are translated to an instance: whom they should reach.

Policies judge the translated packet, with the address that it was sent from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from insula.model.objects import Port
from insula.network.endpoints import port_name
from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import NumberRange, Service, Space
from insula.network.ranges import number_of, overlap
from insula.network.reference.expectation import Expectation, is_untracked, is_usual
from insula.network.reference.outside import Door, OutsideReference, Translated
from insula.network.reference.policies import PolicyReference
from insula.network.reference.ranges import Outside


class _Way(NamedTuple):
    """A translation that takes place, the port that it leads to, and whether it runs."""

    end: Translated
    port: Port
    place: NetworkPlace
    sure: bool


class TranslationReference:
    """`owners` are the ports by address, `running` the indices of those that are plugged, `subnets` the ranges of the
    tenant's networks."""

    def __init__(
        self,
        doors: OutsideReference,
        policies: PolicyReference,
        outside: Outside,
        owners: Mapping[int, Port],
        running: Collection[int],
        subnets: Sequence[NumberRange],
        services: Sequence[Service],
    ) -> None:
        self._doors = doors
        self._policies = policies
        self._outside = outside
        self._owners = owners
        self._running = running
        self._subnets = subnets
        self._services = services
        self._known: dict[tuple[int, Translated, int, NumberRange | None], bool] = {}
        self._samples = [number_of({4: "198.51.100.1", 6: "2001:db8:1::1"}[doors.version]), *policies.ranges()]
        self._usual = [is_usual(each, doors.version) for each in services]

    def kind(self, port: Port) -> int | None:
        """Return what is the same for ports whose packets are translated in the same way."""
        return port.index if self._doors.any else None

    def from_uplink(self, found: Expectation, space: Space, senders: Sequence[PacketSource]) -> None:
        """Add what packets from the outside reach."""
        ports = [*self._owners.values()]
        for target, range_ in enumerate(space.targets):
            addresses, comes = self._doors.entering(range_)
            for number, door in self._taken(addresses):
                ways = self._ways(door, number, ports)
                for sender, source in enumerate(senders):
                    bit = 1 << space.cell(sender, target) + number
                    required = comes and self._usual[number] and self._is_foreign(source.address)
                    self._add(found, bit, source.address, self._services[number], ways, required=required)

    def from_port(
        self,
        found: Expectation,
        cell: int,
        source: NumberRange,
        mine: Port,
        range_: NumberRange,
        joined: Collection[str],
    ) -> int:
        """Add what packets of a port to an external or internal address reach, and return the services that are
        translated. `joined` are the networks that the port's reaches."""
        passed = 0
        for number, door in self._taken(self._doors.dialed(range_)):
            passed |= 1 << number
            internal = door.network is not None
            ports = [p for p in self._owners.values() if not internal or p.network in joined]
            near = not internal or door.network in joined
            ways = self._ways(door, number, ports)
            ways = [way._replace(sure=way.sure and way.port.index != mine.index) for way in ways]
            required = near and self._usual[number] and not self._outside.is_special(range_)
            self._add(found, 1 << cell + number, source, self._services[number], ways, required=required)
        return passed

    def _taken(self, addresses: Collection[str | None]) -> Iterator[tuple[int, Door]]:
        """Yield the services that doors at these addresses take, by number."""
        for number, service in enumerate(self._services) if addresses else ():
            if (door := self._doors.door(addresses, service)) is not None:
                yield number, door

    def _ways(self, door: Door, number: int, ports: Sequence[Port]) -> list[_Way]:
        """Return where packets of a service may go through a door, among these ports."""
        service, known = self._services[number], {port.index for port in ports}
        found = []
        for end in self._doors.ends(door, service):
            owner = self._owners.get(end.address)
            if owner is not None and owner.index in known:
                place = NetworkPlace("port", port_name(owner), end.text)
                found.append(_Way(end, owner, place, owner.index in self._running))
        return found

    def _add(
        self,
        found: Expectation,
        bit: int,
        source: NumberRange | None,
        service: Service,
        ways: Sequence[_Way],
        *,
        required: bool,
    ) -> None:
        for way in ways:
            passes = self._passes(source, way.end, service)
            if passes is not False:
                found.permit(way.place, bit)
            if passes and required and way.sure:
                found.require(way.place, bit)

    def _passes(self, source: NumberRange | None, end: Translated, service: Service) -> bool | None:
        """Whether policies let a translated packet pass. Of packets from anywhere some pass, or it is not known."""
        if is_untracked(service) or (source is None and not self._policies.judges):
            return True
        sources = [source.low] if source else self._samples
        passes = any(self._passed(each, end, service) for each in sources)
        return passes if source else passes or None

    def _passed(self, source: int, end: Translated, service: Service) -> bool:
        key = source, end, service.protocol.low, None if end.port else service.target
        if key not in self._known:
            self._known[key] = self._policies.passes(source, end.address, service, end.port)
        return self._known[key]

    def _is_foreign(self, source: NumberRange | None) -> bool:
        """Whether packets with this source may come from the outside: none of the tenant's own addresses."""
        if source is None:
            return True
        return self._outside.has(source) and not any(overlap(source, each) for each in self._subnets)
