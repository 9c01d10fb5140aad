"""The part of the reference model about service endpoints: what comes to the peer that has the service, and from there
to its instance.

Between the routers of both tenants packets have addresses of the fabric's: one for each service, and those of clients.
The consumer's and the provider's policies see these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from insula.model.policies import PortMatch
from insula.network.intent import PeeringIntent, TenantIntent
from insula.network.interpreter.delivery import NetworkPlace, translated
from insula.network.interpreter.space import NumberRange
from insula.network.ranges import number_of

BetweenPeers = Callable[[int, int], Sequence[str]]
"""Returns the addresses with a number of a peering (`Fabric.between_peers`)."""


class Consumed(NamedTuple):
    """A service at an address of a network. Packets leave to `place`, with the address `between`. `sure`: the provider
    is on this host."""

    network: str
    address: int
    match: PortMatch
    place: NetworkPlace
    between: NumberRange
    sure: bool


class Provided(NamedTuple):
    """A service that packets of a peer come to with the address `between`, to be led to a port of `address`."""

    peering: PeeringIntent
    between: NumberRange
    match: PortMatch
    address: int
    text: str


class ServiceReference:
    """The service endpoints of one tenant, for one version of IP."""

    def __init__(self, intent: TenantIntent, version: int, between: BetweenPeers) -> None:
        self._intent = intent
        self._version = version
        self._between = between
        self.consumed = list(self._consumed())
        self.provided = list(self._provided())

    def clients(self, peering: PeeringIntent) -> set[int]:
        """Return the addresses of the peer's clients on other hosts."""
        return {each.low for number in peering.clients for each in self._atoms(self._between(peering.index, number))}

    def addresses(self) -> Iterator[int]:
        """Yield all single addresses that matter."""
        for consumed in self.consumed:
            yield from (consumed.address, consumed.between.low)
        for provided in self.provided:
            yield from (provided.between.low, *self.clients(provided.peering))

    def matches(self) -> Iterator[PortMatch]:
        """Yield the ports of all services."""
        yield from (each.match for each in self.consumed)
        yield from (each.match for each in self.provided)

    def _consumed(self) -> Iterator[Consumed]:
        for peering in self._intent.peerings:
            for each in peering.consumes:
                match = PortMatch(protocol=each.protocol, port=each.port)
                for between in self._atoms(self._between(peering.index, each.number)):
                    port = NumberRange(each.port, each.port)
                    place = NetworkPlace("peer", peering.peer.name, translated(self._version, between, port))
                    for here in self._atoms(each.addresses):
                        yield Consumed(each.network, here.low, match, place, between, each.host is None)

    def _provided(self) -> Iterator[Provided]:
        for peering in self._intent.peerings:
            for each in peering.provides:
                match, port = PortMatch(protocol=each.protocol, port=each.port), NumberRange(each.port, each.port)
                for between in self._atoms(self._between(peering.index, each.number)):
                    for to in self._atoms(each.addresses):
                        yield Provided(peering, between, match, to.low, translated(self._version, to, port))

    def _atoms(self, addresses: Sequence[str]) -> list[NumberRange]:
        """Return the addresses of this version."""
        numbers = [number_of(each) for each in addresses if (":" in each) == (self._version == 6)]
        return [NumberRange(each, each) for each in numbers]
