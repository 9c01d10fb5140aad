"""The reference model: whom a tenant's instances should reach, computed from the tenant's intent alone.

For packet classes of a `Space` it tells two sets for each place: the classes that are *required* to come there, and
those that are *permitted* to. What is installed must be between the two. They differ where the promise leaves room: a
fabric may drop what makes no sense, such as answers of DHCP servers that instances send.

It shares no code with what installs rules and with what interprets them; a test checks the imports.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from insula.model.objects import Network, Port
from insula.model.routers import Router
from insula.network.addresses import link_local
from insula.network.endpoints import port_name
from insula.network.fabric import Entries
from insula.network.intent import PeeringIntent, TenantIntent
from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import ECHO, TCP, UDP, Boundaries, NumberRange, Service, Space
from insula.network.ranges import contains, overlap, range_of
from insula.network.reference import policies
from insula.network.reference.expectation import NEIGHBOURS, SERVERS, Expectation, is_usual
from insula.network.reference.groups import of_groups
from insula.network.reference.host import RESOLVERS
from insula.network.reference.links import addresses_of, remotes
from insula.network.reference.outside import OutsideReference
from insula.network.reference.policies import PolicyReference
from insula.network.reference.ranges import Outside, is_group
from insula.network.reference.services import BetweenPeers, Consumed, ServiceReference
from insula.network.reference.sets import CLIENTS, DNS, Gateway, ServiceSets
from insula.network.reference.translation import TranslationReference


class ReferenceModel:
    """The reference model of one tenant and one version of IP.

    `running` are the indices of its ports that are plugged, `reserved` ranges of the fabric in CIDR notation, `entries`
    its addresses for what comes from outside, and `between` those of service endpoints.
    """

    def __init__(
        self,
        intent: TenantIntent,
        version: int,
        reserved: Iterable[str],
        running: Collection[int],
        entries: Entries | None = None,
        between: BetweenPeers = lambda *_: (),
    ) -> None:
        self.intent = intent
        self.version = version
        self._networks = {network.name: network for network in intent.networks}
        self._running = running
        self._beside: dict[str, dict[str, Network]] = {}  # the networks that each reaches
        self._outside = Outside(version, reserved)
        self._running_places = {place_of(port) for port in intent.ports if port.index in running}
        self._doors = OutsideReference(intent, version, entries or Entries())
        self._services = ServiceReference(intent, version, between)
        guests = [port for port in intent.ports if version == 6 and port.address6]
        self._link_locals = {int(ip_address(link_local(port.mac))): port for port in guests}
        self._elsewhere = {
            int(ip_address(text)): remote.network
            for remote in remotes(intent)
            for text in addresses_of(remote)
            if (":" in text) == (version == 6)
        }

    # -- addresses ---------------------------------------------------------------------------------------------------

    def owners(self) -> dict[int, Port]:
        """Return the ports by their addresses, and by further ones that they may use: one for each address."""
        return {address: some[0] for address, some in self.holders().items()}

    def holders(self) -> dict[int, list[Port]]:
        """Return the ports by their addresses, and by further ones of their network that they may use: several may use
        one that none of them has."""
        found: dict[int, list[Port]] = {}
        for port in self.intent.ports:
            for address in dict.fromkeys(address for address, _ in self._further(port)):
                found.setdefault(address, []).append(port)
        return {**found, **{address: [port] for port in self.intent.ports for address in self.addresses(port)}}

    def _further(self, port: Port) -> Iterator[tuple[int, str]]:
        """Yield the single addresses of a port's network that it may use beside its own, each with the MAC address."""
        subnet = self.subnet(self._networks[port.network]) if port.network in self._networks else None
        for pair in port.allowed_pairs if subnet else ():
            if (":" in pair.address) == (self.version == 6) and subnet:
                range_ = range_of(pair.address)
                if range_.low == range_.high and overlap(subnet, range_):
                    yield range_.low, pair.mac or port.mac

    def addresses(self, port: Port) -> list[int]:
        """Return the addresses of a port in its network."""
        address = port.address if self.version == 4 else port.address6
        return [int(ip_address(address))] if address else []

    def senders(self) -> list[PacketSource]:
        """Return the ports with each of the addresses that they may use."""
        return [
            PacketSource(place_of(port), NumberRange(address, address), mac)
            for port in self.intent.ports
            for address, mac in dict.fromkeys([*((a, port.mac) for a in self.addresses(port)), *self._further(port)])
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
            for subnet in (*self._beyond(peering), *self._on_others(peering)):
                into.addresses.add(*subnet)
            for match in peering.allow:
                policies.cut_port(match, into)
        for address in self._services.addresses():
            into.addresses.add(address, address)
        for match in self._services.matches():
            policies.cut_port(match, into)
        self._outside.cut(into)
        self._doors.cut(into)
        policies.cut(self.intent, into)
        for protocol in (TCP, UDP):
            into.targets[protocol].add(DNS, DNS)
            into.targets[protocol].add(*RESOLVERS)
        into.sources[UDP].add(SERVERS[self.version], SERVERS[self.version])
        for source, target in CLIENTS:
            into.sources[UDP].add(source, source)
            into.targets[UDP].add(target, target)
        for type_ in (ECHO[self.version], *(NEIGHBOURS if self.version == 6 else ())):
            into.types.add(type_, type_)
        into.tells.append(self._told)

    def _told(self, services: Sequence[Service]) -> Iterator[int]:
        """Yield the sets of services that this model tells from others."""
        policies = PolicyReference(self.intent, self.version, services)
        yield from ServiceSets(self.version, services).sets()
        yield from policies.sets()
        yield from self._doors.told(services)
        for peering in self.intent.peerings:
            yield policies.of_ports(peering.allow)
        for match in self._services.matches():
            yield policies.of_ports([match])

    # -- the model ---------------------------------------------------------------------------------------------------

    def of_ports(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets of the ports should reach; the senders are those of `senders`."""
        found = self._nothing(space)
        holders, ports = self.holders(), {place_of(port): port for port in self.intent.ports}
        policies, services = (
            PolicyReference(self.intent, self.version, space.services),
            ServiceSets(self.version, space.services),
        )
        translation = self._translation(space, policies)
        targets: dict[str, list[_Target]] = {}
        rows: dict[object, Expectation] = {}  # ports that are alike to networks and policies have the same
        for number, sender in enumerate(senders):
            assert sender.address is not None
            low, mine = sender.address.low, ports[sender.place]
            if mine.network not in targets:
                targets[mine.network] = [self._target(mine.network, each, holders) for each in space.targets]
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

    def of_groups(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets of the ports to everybody in their networks should reach."""
        ports = {place_of(port): port for port in self.intent.ports}
        policies = PolicyReference(self.intent, self.version, space.services)
        return of_groups(ports, self._running, self._broadcasts(), policies, self.version, space, senders)

    def _broadcasts(self) -> dict[str, int]:
        """Return the broadcast addresses of networks by name."""
        found = {name: self.subnet(each) for name, each in self._networks.items()} if self.version == 4 else {}
        return {name: subnet.high for name, subnet in found.items() if subnet}

    def _target(self, network: str, range_: NumberRange, holders: Mapping[int, Sequence[Port]]) -> _Target:
        """Return what is the same for all ports of a network about packets to these addresses."""
        places = [] if is_group(self.version, range_) else self._destinations(network, range_, holders)
        required = len(places) == 1 and self._is_required(range_, places[0], holders)
        return _Target(range_, places, required, self._gateway_for(network, range_), self._services_at(network, range_))

    def _add_near(
        self,
        row: Expectation,
        cell: int,
        source: _Source,
        target: _Target,
        policies: PolicyReference,
        services: ServiceSets,
    ) -> None:
        """Add what packets of a port to one range of addresses reach at the router, and by service endpoints."""
        router, to_router = NetworkPlace("router"), services.of_router(target.gateway)
        if source.resolves:
            row.require(router, to_router.required << cell)
            row.permit(router, to_router.permitted << cell)
        else:
            row.permit(router, (to_router.permitted & ~services.of_resolver) << cell)
        row.permit(router, (services.queries(source.named) | source.named) << cell)
        for each in target.services:
            allowed = policies.of_ports([each.match]) & policies.inside(source.address.low, each.between)
            allowed &= ~services.queries(source.named)
            row.permit(each.place, allowed << cell)
            if each.sure:
                row.require(each.place, (allowed & services.usual) << cell)

    def _add_far(
        self,
        row: Expectation,
        cell: int,
        source: _Source,
        target: _Target,
        policies: PolicyReference,
        services: ServiceSets,
        translation: TranslationReference,
    ) -> None:
        """Add what packets of a port to one range of addresses reach beyond the router."""
        mine, address = source.port, source.address
        passed = translation.from_port(row, cell, address, mine, target.range, self._joined(mine.network))
        if not target.places:
            return
        queries = services.queries(source.named)  # these are redirected, and so may be what names allow
        leaving = target.places[0].kind == "uplink"
        ends = self._leaving(address.low) if leaving else target.places
        judged = policies.allowed if leaving else policies.inside
        allowed = judged(address.low, target.range) & ~queries & ~passed
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

    def _services_at(self, network: str, range_: NumberRange) -> list[Consumed]:
        """Return the service endpoints at an address."""
        return [
            each for each in self._services.consumed if (each.network, each.address, each.address) == (network, *range_)
        ]

    def _destinations(
        self, network: str, range_: NumberRange, holders: Mapping[int, Sequence[Port]]
    ) -> list[NetworkPlace]:
        """Return where packets of a network's ports to these addresses end; several if it is one of these."""
        joined = self._joined(network)
        here = holders.get(range_.low, ()) if range_.low == range_.high else ()
        if found := [place_of(owner) for owner in here if owner.network in joined]:
            return found
        if (neighbour := self._near(range_)) and neighbour.network == network:  # the router sends it back
            return [place_of(neighbour)]
        if range_.low == range_.high and self._elsewhere.get(range_.low) in joined:
            return [NetworkPlace("overlay", self._elsewhere[range_.low])]
        if any(subnet and overlap(subnet, range_) for subnet in map(self.subnet, joined.values())):
            return []
        for peering in self.intent.peerings:
            if any(overlap(each, range_) for each in self._beyond(peering)):
                return [NetworkPlace("peer", peering.peer.name)] if network in peering.networks else []
        if (hop := self._next_hop(network, range_)) is not None:
            return [place_of(owner) for owner in holders.get(hop, ())]
        if self._is_inside(range_) or self._networks[network].outbound != "nat":
            return []
        return [NetworkPlace("uplink")]

    def _near(self, range_: NumberRange) -> Port | None:
        """Return the port whose link-local address this is: one that a guest has made itself (RFC 4862)."""
        return self._link_locals.get(range_.low) if range_.low == range_.high else None

    def _is_required(self, range_: NumberRange, place: NetworkPlace, holders: Mapping[int, Sequence[Port]]) -> bool:
        """Whether packets to these addresses have to come to their place, and not only may."""
        if place.kind == "uplink":
            return self._outside.has(range_)
        if place.kind in ("peer", "overlay"):
            return not self._outside.is_special(range_)
        if range_.low in self._own():
            return False
        if any(range_.low not in self.addresses(owner) for owner in holders.get(range_.low, ())):
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

    def _gateway_for(self, network: str, range_: NumberRange) -> Gateway:
        """Tell whether an atom is the gateway of a network, or is only pinged: a service endpoint there, or the gateway
        of another network that its router joins."""
        for name, each in self._joined(network).items():
            if range_.low == self.gateway(each) == range_.high:
                return "own" if name == network else "pinged"
        return "pinged" if self._services_at(network, range_) else "none"

    def of_peer(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets from a peering should reach: the ports of its networks that it allows, if policies do."""
        found = self._nothing(space)
        holders, policies = self.holders(), PolicyReference(self.intent, self.version, space.services)
        services = ServiceSets(self.version, space.services)
        for peering in self.intent.peerings:
            allowed = policies.of_ports(peering.allow)
            for number, sender in enumerate(senders):
                if sender.place.name != peering.peer.name or sender.address is None:
                    continue
                visits = peering.routed and any(overlap(each, sender.address) for each in self._beyond(peering))
                self._add_provided(found, space, number, sender.address, peering, policies)
                for target, range_ in enumerate(space.targets):
                    here = holders.get(range_.low, ()) if range_.low == range_.high else ()
                    passing = allowed & policies.inside(sender.address.low, range_) if here else 0
                    cell = space.cell(number, target)
                    for owner in here:
                        if owner.network not in peering.networks:
                            continue
                        found.permit(place_of(owner), (passing | services.ignored) << cell)
                        if owner.index in self._running and range_.low in self.addresses(owner) and visits:
                            found.require(place_of(owner), (passing & services.usual) << cell)
        return found

    def _add_provided(
        self,
        found: Expectation,
        space: Space,
        number: int,
        source: NumberRange,
        peering: PeeringIntent,
        policies: PolicyReference,
    ) -> None:
        """Add what packets of a peer reach by the services that this tenant provides."""
        owners, clients = self.owners(), self._services.clients(peering)
        usual = sum(is_usual(each, self.version) << n for n, each in enumerate(space.services))
        for each in self._services.provided:
            owner = owners.get(each.address)
            if each.peering != peering or owner is None or each.between not in space.targets:
                continue
            passing = policies.of_ports([each.match]) & policies.of_ports(peering.allow)
            passing &= policies.inside(source.low, NumberRange(each.address, each.address))
            place = place_of(owner)._replace(address=each.text)
            cell = space.cell(number, space.targets.index(each.between))
            found.permit(place, passing << cell)
            visits = any(overlap(beyond, source) for beyond in self._beyond(peering))
            if owner.index in self._running and not visits and (not peering.clients or source.low in clients):
                found.require(place, (passing & usual) << cell)

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
        found = self._nothing(space)
        policies = PolicyReference(self.intent, self.version, space.services)
        self._translation(space, policies).from_uplink(found, space, senders)
        return found

    def _is_inside(self, range_: NumberRange) -> bool:
        """Whether addresses are in one of the tenant's networks."""
        subnets = [self.subnet(network) for network in self._networks.values()]
        return any(subnet and overlap(subnet, range_) for subnet in subnets)

    def _nothing(self, space: Space) -> Expectation:
        """Return what is to be expected at first: the router may get what is for everybody, and nobody else by it."""
        found = Expectation()
        found.permit(NetworkPlace("router"), self._without_promise(space))
        return found

    def _without_promise(self, space: Space) -> int:
        """Return the classes whose destination is multicast or broadcast."""
        return self._outside.without_promise(space, [NumberRange(each, each) for each in self._broadcasts().values()])


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
    places: Sequence[NetworkPlace]
    required: bool
    gateway: Gateway
    services: Sequence[Consumed]


def place_of(port: Port) -> NetworkPlace:
    """Return the place of a port."""
    return NetworkPlace("port", port_name(port))
