"""The reference model: whom a tenant's instances should reach, computed from the tenant's intent alone.

For packet classes of a `Space` it tells two sets for each place: the classes that are *required* to come there, and
those that are *permitted* to. What is installed must be between the two. They differ where the promise leaves room: a
fabric may drop what makes no sense, such as answers of DHCP servers that instances send.

It shares no code with what installs rules and with what interprets them; a test checks the imports.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Final, Literal, NamedTuple

from insula.model.objects import Network, Port
from insula.model.policies import PortMatch
from insula.model.routers import Router
from insula.network import reference_policies
from insula.network.endpoints import port_name
from insula.network.expectation import NEIGHBOURS, SERVERS, Expectation, is_usual
from insula.network.fabric import Entries
from insula.network.intent import PeeringIntent, TenantIntent
from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import ECHO, ICMP, ICMPV6, TCP, UDP, Boundaries, NumberRange, Service, Space
from insula.network.ranges import contains, overlap, range_of
from insula.network.reference_host import RESOLVERS
from insula.network.reference_links import addresses_of, remotes
from insula.network.reference_outside import OutsideReference
from insula.network.reference_policies import PolicyReference
from insula.network.reference_ranges import Outside
from insula.network.reference_translation import TranslationReference

_DNS: Final = 53
_CLIENTS: Final = {(68, 67), (546, 547)}
"""Source and destination ports of DHCP clients (RFC 2131, RFC 8415)."""


class ReferenceModel:
    """The reference model of one tenant and one version of IP.

    `running` are the indices of its ports that are plugged, `reserved` ranges of the fabric in CIDR notation, `entries`
    its addresses for what comes from outside.
    """

    def __init__(
        self,
        intent: TenantIntent,
        version: int,
        reserved: Iterable[str],
        running: Collection[int],
        entries: Entries | None = None,
    ) -> None:
        self.intent = intent
        self.version = version
        self._networks = {network.name: network for network in intent.networks}
        self._running = running
        self._beside: dict[str, dict[str, Network]] = {}  # the networks that each reaches
        self._outside = Outside(version, reserved)
        self._running_places = {place_of(port) for port in intent.ports if port.index in running}
        self._doors = OutsideReference(intent, version, entries or Entries())
        self._elsewhere = {
            int(ip_address(text)): remote.network
            for remote in remotes(intent)
            for text in addresses_of(remote)
            if (":" in text) == (version == 6)
        }

    # -- addresses ---------------------------------------------------------------------------------------------------

    def owners(self) -> dict[int, Port]:
        """Return the ports by their addresses, and by further ones of their network that they may use."""
        further = {address: port for port in self.intent.ports for address in self._further(port)}
        return {**further, **{address: port for port in self.intent.ports for address in self.addresses(port)}}

    def _further(self, port: Port) -> list[int]:
        """Return the single addresses of a port's network that it may use beside its own."""
        subnet = self.subnet(self._networks[port.network]) if port.network in self._networks else None
        single = [range_of(pair.address) for pair in port.allowed_pairs if (":" in pair.address) == (self.version == 6)]
        return [each.low for each in single if subnet and each.low == each.high and overlap(subnet, each)]

    def addresses(self, port: Port) -> list[int]:
        """Return the addresses of a port in its network."""
        address = port.address if self.version == 4 else port.address6
        return [int(ip_address(address))] if address else []

    def senders(self) -> list[PacketSource]:
        """Return the ports with each of their addresses."""
        return [
            PacketSource(place_of(port), NumberRange(address, address), port.mac)
            for port in self.intent.ports
            for address in self.addresses(port)
        ]

    def subnet(self, network: Network) -> NumberRange | None:
        subnet = network.subnet if self.version == 4 else network.subnet6
        return range_of(subnet) if subnet else None

    def gateway(self, network: Network) -> int | None:
        gateway = network.gateway if self.version == 4 else network.gateway6
        return int(ip_address(gateway)) if gateway else None

    def cut(self, into: Boundaries) -> None:
        """Add the boundaries of the intent."""
        for address in (*self.owners(), *self._elsewhere):
            into.addresses.add(address, address)
        for network in self._networks.values():
            if (subnet := self.subnet(network)) and (gateway := self.gateway(network)) is not None:
                into.addresses.add(*subnet)
                into.addresses.add(gateway, gateway)
                into.addresses.add(subnet.low, subnet.low)
                into.addresses.add(subnet.high, subnet.high)
        for router in self.intent.routers:
            for route in router.routes:
                if (":" in route.destination) == (self.version == 6):
                    into.addresses.add(*range_of(route.destination))
        for peering in self.intent.peerings:
            for service in peering.consumes:
                reference_policies.cut_port(PortMatch(protocol=service.protocol, port=service.port), into)
                for text in service.addresses:
                    if (":" in text) == (self.version == 6):
                        into.addresses.add(int(ip_address(text)), int(ip_address(text)))
            for subnet in (*self._beyond(peering), *self._on_others(peering)):
                into.addresses.add(*subnet)
            for match in peering.allow:
                reference_policies.cut_port(match, into)
        self._outside.cut(into)
        self._doors.cut(into)
        reference_policies.cut(self.intent, into)
        for protocol in (TCP, UDP):
            into.targets[protocol].add(_DNS, _DNS)
            into.targets[protocol].add(*RESOLVERS)
        into.sources[UDP].add(SERVERS[self.version], SERVERS[self.version])
        for source, target in _CLIENTS:
            into.sources[UDP].add(source, source)
            into.targets[UDP].add(target, target)
        for type_ in (ECHO[self.version], *(NEIGHBOURS if self.version == 6 else ())):
            into.types.add(type_, type_)
        into.tells.append(self._told)

    def _told(self, services: Sequence[Service]) -> Iterator[int]:
        """Yield the sets of services that this model tells from others."""
        policies = PolicyReference(self.intent, self.version, services)
        yield from _Services(self.version, services).sets()
        yield from policies.sets()
        yield from self._doors.told(services)
        for peering in self.intent.peerings:
            yield policies.of_ports(peering.allow)
            for each in peering.consumes:
                yield policies.of_ports([PortMatch(protocol=each.protocol, port=each.port)])

    # -- the model ---------------------------------------------------------------------------------------------------

    def of_ports(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets of the ports should reach; the senders are those of `senders`."""
        found = Expectation(ignored=self._without_promise(space))
        owners = self.owners()
        policies, services = (
            PolicyReference(self.intent, self.version, space.services),
            _Services(self.version, space.services),
        )
        translation = self._translation(space, policies)
        targets: dict[str, list[_Target]] = {}
        rows: dict[object, Expectation] = {}  # ports that are alike to networks and policies have the same
        for number, sender in enumerate(senders):
            assert sender.address is not None
            low, mine = sender.address.low, owners[sender.address.low]
            if mine.network not in targets:
                targets[mine.network] = [self._target(mine.network, each, owners) for each in space.targets]
            source = _Source(mine, sender.address, policies.named(low), policies.resolves(low))
            alike = (mine.network, source[2:], *self._leaving(low), policies.kind(low), translation.kind(mine))
            if alike not in rows:
                rows[alike] = Expectation()
                for cell, target in zip(space.row_cells(), targets[mine.network], strict=True):
                    self._add_near(rows[alike], cell, source, target, policies, services)
                    self._add_far(rows[alike], cell, source, target, policies, services, translation)
            for place, bits in rows[alike].permitted.items():
                found.permit(place, bits << space.cell(number, 0))
            for place, bits in rows[alike].required.items():
                if place != place_of(mine):  # nobody has to reach itself
                    found.require(place, bits << space.cell(number, 0))
        return found

    def _target(self, network: str, range_: NumberRange, owners: Mapping[int, Port]) -> _Target:
        """Return what is the same for all ports of a network about packets to these addresses."""
        place = self._destination(network, range_, owners)
        required = place is not None and self._is_required(range_, place, owners)
        return _Target(
            range_, place, required, self._gateway_for(network, range_), [*self._services_at(network, range_)]
        )

    def _add_near(
        self,
        row: Expectation,
        cell: int,
        source: _Source,
        target: _Target,
        policies: PolicyReference,
        services: _Services,
    ) -> None:
        """Add what packets of a port to one range of addresses reach at the router, and by service endpoints."""
        router, to_router = NetworkPlace("router"), services.of_router(target.gateway)
        if source.resolves:
            row.require(router, to_router.required << cell)
            row.permit(router, to_router.permitted << cell)
        else:
            row.permit(router, (to_router.permitted & ~services.of_resolver) << cell)
        row.permit(router, (services.queries(source) | source.named) << cell)
        for peer, matches in target.services:
            row.permit(peer, policies.of_ports(matches) << cell)

    def _add_far(
        self,
        row: Expectation,
        cell: int,
        source: _Source,
        target: _Target,
        policies: PolicyReference,
        services: _Services,
        translation: TranslationReference,
    ) -> None:
        """Add what packets of a port to one range of addresses reach beyond the router."""
        mine, address = source.port, source.address
        passed = translation.from_port(row, cell, address, mine, target.range, self._joined(mine.network))
        if (place := target.place) is None:
            return
        queries = services.queries(source)  # these are redirected, and so may be what names allow
        leaving = place.kind == "uplink"
        ends = self._leaving(address.low) if leaving else [place]
        allowed = policies.allowed(address.low, target.range) & ~queries & ~passed
        by_name = source.named & ~queries if leaving else 0
        for end in ends:
            row.permit(end, (allowed | by_name | services.ignored) << cell)
        if len(ends) == 1 and target.required:
            row.require(ends[0], (allowed & services.usual) << cell)

    def _leaving(self, address: int) -> list[NetworkPlace]:
        """Return the ways out of packets with this source: one is with a floating address that leads to it."""
        floating = self._doors.sources.get(address, ())
        return [NetworkPlace("untranslated", "", each) for each in floating] or [NetworkPlace("uplink")]

    def _translation(self, space: Space, policies: PolicyReference) -> TranslationReference:
        subnets = [subnet for subnet in map(self.subnet, self._networks.values()) if subnet]
        return TranslationReference(
            self._doors, policies, self._outside, self.owners(), self._running, subnets, space.services
        )

    def _services_at(self, network: str, range_: NumberRange) -> Iterator[tuple[NetworkPlace, list[PortMatch]]]:
        """Yield the peers that service endpoints at an address lead to, with the endpoints' ports."""
        for peering in self.intent.peerings:
            for each in peering.consumes:
                here = [int(ip_address(a)) for a in each.addresses if (":" in a) == (self.version == 6)]
                if each.network == network and range_.low == range_.high and range_.low in here:
                    match = PortMatch(protocol=each.protocol, port=each.port)
                    yield NetworkPlace("peer", peering.peer.name), [match]

    def _destination(self, network: str, range_: NumberRange, owners: Mapping[int, Port]) -> NetworkPlace | None:
        """Return where packets of a network's ports to these addresses end; None if nowhere."""
        joined = self._joined(network)
        owner = owners.get(range_.low) if range_.low == range_.high else None
        if owner is not None and owner.network in joined:
            return place_of(owner)
        if range_.low == range_.high and self._elsewhere.get(range_.low) in joined:
            return NetworkPlace("overlay", self._elsewhere[range_.low])
        if any(subnet and overlap(subnet, range_) for subnet in map(self.subnet, joined.values())):
            return None
        for peering in self.intent.peerings:
            if any(overlap(each, range_) for each in self._beyond(peering)):
                return NetworkPlace("peer", peering.peer.name) if network in peering.networks else None
        if (hop := self._next_hop(network, range_)) is not None:
            return place_of(owners[hop]) if hop in owners else None
        if self._is_inside(range_) or self._networks[network].outbound != "nat":
            return None
        return NetworkPlace("uplink")

    def _is_required(self, range_: NumberRange, place: NetworkPlace, owners: Mapping[int, Port]) -> bool:
        """Whether packets to these addresses have to come to their place, and not only may."""
        if place.kind == "uplink":
            return self._outside.has(range_)
        if place.kind in ("peer", "overlay"):
            return not self._outside.is_special(range_)
        if range_.low in self._own():
            return False
        if (owner := owners.get(range_.low)) and range_.low not in self.addresses(owner):
            return False  # an instance need not use a further address; another one may
        return place in self._running_places and not self._outside.is_special(range_)

    def _own(self) -> set[int]:
        """Return the addresses of gateways and of whole subnets, also of networks that are apart: a static route need
        not reach these."""
        networks = self._networks.values()
        ends = (each for network in networks if (subnet := self.subnet(network)) for each in subnet)
        return {*ends, *(each for network in networks if (each := self.gateway(network)) is not None)}

    def _joined(self, network: str) -> dict[str, Network]:
        """Return the networks that instances of a network reach: it, and those of its router."""
        if network not in self._beside:
            router = self._router(network)
            names = {network, *(router.networks if router else ())}
            self._beside[network] = {name: self._networks[name] for name in names if name in self._networks}
        return self._beside[network]

    def _router(self, network: str) -> Router | None:
        return next((router for router in self.intent.routers if network in router.networks), None)

    def _next_hop(self, network: str, range_: NumberRange) -> int | None:
        """Return the next hop of the static route with the longest destination that has these addresses."""
        router = self._router(network)
        found: tuple[int, int] | None = None
        for route in router.routes if router else ():
            if (":" in route.destination) == (self.version == 6) and contains(range_of(route.destination), range_):
                length = int(route.destination.partition("/")[2])
                if found is None or length > found[0]:
                    found = length, int(ip_address(route.next_hop))
        return found[1] if found else None

    def _gateway_for(self, network: str, range_: NumberRange) -> Literal["own", "pinged", "none"]:
        """Tell whether an atom is the gateway of a network, or is only pinged: a service endpoint there, or the gateway
        of another network that its router joins."""
        for name, each in self._joined(network).items():
            if range_.low == self.gateway(each) == range_.high:
                return "own" if name == network else "pinged"
        return "pinged" if any(self._services_at(network, range_)) else "none"

    def of_peer(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets from a peering should reach: the ports of its networks that it allows, if policies do."""
        found = Expectation(ignored=self._without_promise(space))
        owners, policies = self.owners(), PolicyReference(self.intent, self.version, space.services)
        services = _Services(self.version, space.services)
        for peering in self.intent.peerings:
            allowed = policies.of_ports(peering.allow)
            for number, sender in enumerate(senders):
                if sender.place.name != peering.peer.name or sender.address is None:
                    continue
                for target, range_ in enumerate(space.targets):
                    owner = owners.get(range_.low) if range_.low == range_.high else None
                    if owner is None or owner.network not in peering.networks:
                        continue
                    passing = allowed & policies.allowed(sender.address.low, range_)
                    cell = space.cell(number, target)
                    found.permit(place_of(owner), (passing | services.ignored) << cell)
                    if owner.index in self._running:
                        found.require(place_of(owner), (passing & services.usual) << cell)
        return found

    def place_of(self, port: Port) -> NetworkPlace:
        """Return the place of a port."""
        return place_of(port)

    def peer_at(self, range_: NumberRange) -> str | None:
        """Return the tenant of the peering that these addresses belong to."""
        for peering in self.intent.peerings:
            if any(overlap(each, range_) for each in self._beyond(peering)):
                return peering.peer.name
        return None

    def _beyond(self, peering: PeeringIntent) -> list[NumberRange]:
        others = peering.others if peering.routed else ()
        return [subnet for network in others if (subnet := self.subnet(network))]

    def _on_others(self, peering: PeeringIntent) -> list[NumberRange]:
        """Return the peer's addresses on other hosts."""
        found = [address for remote in peering.remotes for address in remote.addresses]
        return [range_of(address) for address in found if (":" in address) == (self.version == 6)]

    def of_uplink(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets from the uplink should reach: what the tenant offers to the outside, and nothing else."""
        found = Expectation(ignored=self._without_promise(space))
        policies = PolicyReference(self.intent, self.version, space.services)
        self._translation(space, policies).from_uplink(found, space, senders)
        return found

    def _is_inside(self, range_: NumberRange) -> bool:
        """Whether addresses are in one of the tenant's networks."""
        subnets = [self.subnet(network) for network in self._networks.values()]
        return any(subnet and overlap(subnet, range_) for subnet in subnets)

    def _without_promise(self, space: Space) -> int:
        """Return the classes whose destination is multicast or broadcast."""
        subnets = [self.subnet(network) for network in self._networks.values()] if self.version == 4 else []
        return self._outside.without_promise(space, [NumberRange(each.high, each.high) for each in subnets if each])


class _Source(NamedTuple):
    """A port that sends from an address, the services of its rules with DNS names, and whether it may use the
    resolver."""

    port: Port
    address: NumberRange
    named: int
    resolves: bool


class _Target(NamedTuple):
    """A range of destinations as the ports of a network see it: where packets end by networks, routers and peerings,
    whether they have to come there, which gateway it is, and the service endpoints there."""

    range: NumberRange
    place: NetworkPlace | None
    required: bool
    gateway: Literal["own", "pinged", "none"]
    services: Sequence[tuple[NetworkPlace, list[PortMatch]]]


class _ToRouter(NamedTuple):
    """Services that a router has to answer, and that it may."""

    required: int
    permitted: int


class _Services:
    """Sets of services, as bits."""

    def __init__(self, version: int, services: Sequence[Service]) -> None:
        echo, icmp = ECHO[version], ICMP if version == 4 else ICMPV6
        self._resolvers = self.ignored = self.of_resolver = self._echo = self._near = self.usual = 0
        for number, each in enumerate(services):
            if version == 6 and each.is_icmp and each.target in [(n, n) for n in NEIGHBOURS]:
                self.ignored |= 1 << number  # unless it is from the same link (RFC 4861, section 7.1)
            self.usual |= is_usual(each, version) << number
            if each.protocol in ((TCP, TCP), (UDP, UDP)) and each.target == (_DNS, _DNS):
                self.of_resolver |= 1 << number
            elif each.has_ports and each.target and contains(RESOLVERS, each.target):
                self._resolvers |= 1 << number
            elif each.protocol == (icmp, icmp) and each.target == (echo, echo):
                self._echo |= 1 << number
            elif (version == 6 and each.is_icmp and each.target in [(n, n) for n in NEIGHBOURS]) or (
                each.source and each.target and (each.source.low, each.target.low) in _CLIENTS
            ):
                self._near |= 1 << number

    def sets(self) -> Iterator[int]:
        """Yield all of these sets."""
        yield from (self._resolvers, self.ignored, self.of_resolver, self._echo, self._near, self.usual)

    def queries(self, source: _Source) -> int:
        """Return the services of DNS that are redirected for a source: all, if it has rules with names."""
        return self.of_resolver if source.named else 0

    def of_router(self, gateway: Literal["own", "pinged", "none"]) -> _ToRouter:
        """Return the services of a gateway, which answers echo requests, and its own network's DNS queries. Any address
        of the router may be asked by neighbor discovery and DHCP."""
        answered = {"own": self.of_resolver | self._echo, "pinged": self._echo, "none": 0}[gateway]
        further = self._resolvers if gateway == "own" else 0
        return _ToRouter(answered & self.usual, answered | further | self._near)


def place_of(port: Port) -> NetworkPlace:
    """Return the place of a port."""
    return NetworkPlace("port", port_name(port))
