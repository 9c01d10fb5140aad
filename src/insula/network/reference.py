"""The reference model: whom a tenant's instances should reach, computed from the tenant's intent alone.

For packet classes of a `Space` it tells two sets for each place: the classes that are *required* to come there, and
those that are *permitted* to. What is installed must be between the two. They differ where the promise leaves room: a
fabric may drop what makes no sense, such as answers of DHCP servers that instances send.

It shares no code with what installs rules and with what interprets them; a test checks the imports.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final, Literal, NamedTuple

from insula.model.objects import Network, Port
from insula.model.policies import PortMatch
from insula.model.routers import Router
from insula.network import reference_outside, reference_policies
from insula.network.endpoints import port_name
from insula.network.intent import PeeringIntent, TenantIntent
from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import ECHO, ICMP, ICMPV6, TCP, UDP, Boundaries, NumberRange, Service, Space
from insula.network.ranges import contains, overlap, range_of
from insula.network.reference_policies import PolicyReference

_DNS: Final = 53
_RESOLVERS: Final = NumberRange(5300, 5399)
"""Ports at which a fabric may have further resolvers, which answer fewer questions."""
_SERVERS: Final = {4: 67, 6: 547}  # source ports of DHCP servers, which instances may not use
_CLIENTS: Final = {(68, 67), (546, 547)}
"""Source and destination ports of DHCP clients (RFC 2131, RFC 8415)."""
_NEIGHBOURS: Final = (133, 135, 136)  # ICMPv6 types of neighbor discovery that hosts send (RFC 4861)
_SPECIAL: Final = {  # never outside: this network, loopback, link-local, multicast and reserved (RFC 6890)
    4: ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"),
    6: ("::/8", "fe80::/9", "ff00::/8"),
}
_GROUPS: Final = {4: ("224.0.0.0/4", "255.255.255.255/32"), 6: ("ff00::/8",)}
_CLOSED: Final = {
    4: ("168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32", "192.0.2.0/24"),
    6: ("fd00:ec2::/32", "fd20:ce::254/128", "2001:db8::/32"),
}


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


class ReferenceModel:
    """The reference model of one tenant and one version of IP.

    `running` are the indices of its ports that are plugged, `reserved` ranges of the fabric in CIDR notation.
    """

    def __init__(self, intent: TenantIntent, version: int, reserved: Iterable[str], running: Collection[int]) -> None:
        self.intent = intent
        self.version = version
        self._networks = {network.name: network for network in intent.networks}
        self._running = running
        self._outside = Outside(version, reserved)

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
        for address in self.owners():
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
            for subnet in self._beyond(peering):
                into.addresses.add(*subnet)
            for match in peering.allow:
                reference_policies.cut_port(match, into)
        self._outside.cut(into)
        reference_outside.cut((each.published for each in self.intent.outside.forwards), into)
        reference_policies.cut(self.intent, into)
        for protocol in (TCP, UDP):
            into.targets[protocol].add(_DNS, _DNS)
            into.targets[protocol].add(*_RESOLVERS)
        into.sources[UDP].add(_SERVERS[self.version], _SERVERS[self.version])
        for source, target in _CLIENTS:
            into.sources[UDP].add(source, source)
            into.targets[UDP].add(target, target)
        for type_ in (ECHO[self.version], *(_NEIGHBOURS if self.version == 6 else ())):
            into.types.add(type_, type_)

    # -- the model ---------------------------------------------------------------------------------------------------

    def of_ports(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets of the ports should reach; the senders are those of `senders`."""
        found = Expectation(ignored=self._without_promise(space))
        owners, usual = self.owners(), sum(1 << n for n, s in enumerate(space.services) if is_usual(s, self.version))
        policies = PolicyReference(self.intent, self.version, space.services)
        services = _Services(self.version, space.services)
        for number, sender in enumerate(senders):
            assert sender.address is not None
            mine, named = owners[sender.address.low], policies.named(sender.address.low)
            queries = services.of_resolver if named else 0  # these are redirected, and so may be what names allow
            for target, range_ in enumerate(space.targets):
                cell = space.cell(number, target)
                to_router = services.of_router(self._gateway_for(mine, range_))
                if policies.resolves(sender.address.low):
                    found.require(NetworkPlace("router"), to_router.required << cell)
                    found.permit(NetworkPlace("router"), to_router.permitted << cell)
                else:
                    found.permit(NetworkPlace("router"), (to_router.permitted & ~services.of_resolver) << cell)
                found.permit(NetworkPlace("router"), (queries | named) << cell)
                for peer, matches in self._services_at(mine, range_):
                    found.permit(peer, policies.of_ports(matches) << cell)
                if (place := self._destination(mine, range_, owners)) is None:
                    continue
                allowed = policies.allowed(sender.address.low, range_) & ~queries
                by_name = named & ~queries if place.kind == "uplink" else 0
                found.permit(place, (allowed | by_name | services.ignored) << cell)
                if self._is_required(mine, range_, place, owners):
                    found.require(place, (allowed & usual) << cell)
        self._add_published(found, space)
        return found

    def _services_at(self, mine: Port, range_: NumberRange) -> Iterator[tuple[NetworkPlace, list[PortMatch]]]:
        """Yield the peers that service endpoints at an address lead to, with the endpoints' ports."""
        for peering in self.intent.peerings:
            for each in peering.consumes:
                here = [int(ip_address(a)) for a in each.addresses if (":" in a) == (self.version == 6)]
                if each.network == mine.network and range_.low == range_.high and range_.low in here:
                    match = PortMatch(protocol=each.protocol, port=each.port)
                    yield NetworkPlace("peer", peering.peer.name), [match]

    def _add_published(self, found: Expectation, space: Space) -> None:
        """Add what published ports permit."""
        for published, port in reference_outside.published(self.intent, self.version):
            passing = reference_outside.classes(published, space.services)
            for target, range_ in enumerate(space.targets):
                if not self._is_inside(range_):
                    for sender in range(space.sources):
                        found.permit(place_of(port), passing << space.cell(sender, target))
                        found.excuse(passing << space.cell(sender, target))

    def _destination(self, mine: Port, range_: NumberRange, owners: Mapping[int, Port]) -> NetworkPlace | None:
        """Return where packets of a port to these addresses end; None if nowhere."""
        joined = self._joined(mine.network)
        owner = owners.get(range_.low) if range_.low == range_.high else None
        if owner is not None and owner.network in joined:
            return place_of(owner)
        if any(subnet and overlap(subnet, range_) for subnet in map(self.subnet, joined.values())):
            return None
        for peering in self.intent.peerings:
            if any(overlap(each, range_) for each in self._beyond(peering)):
                return NetworkPlace("peer", peering.peer.name) if mine.network in peering.networks else None
        if (hop := self._next_hop(mine.network, range_)) is not None:
            return place_of(owners[hop]) if hop in owners else None
        if self._is_inside(range_) or self._networks[mine.network].outbound != "nat":
            return None
        return NetworkPlace("uplink")

    def _is_required(self, mine: Port, range_: NumberRange, place: NetworkPlace, owners: Mapping[int, Port]) -> bool:
        """Whether packets to these addresses have to come to their place, and not only may."""
        if place.kind == "uplink":
            return self._outside.has(range_)
        if place.kind == "peer":
            return not self._outside.is_special(range_)
        if range_.low in self._own():
            return False
        running = {place_of(port) for port in owners.values() if port.index in self._running}
        if (owner := owners.get(range_.low)) and range_.low not in self.addresses(owner):
            return False  # an instance need not use a further address; another one may
        return place != place_of(mine) and place in running and not self._outside.is_special(range_)

    def _own(self) -> set[int]:
        """Return the addresses of gateways and of whole subnets, also of networks that are apart: a static route need
        not reach these."""
        networks = self._networks.values()
        ends = (each for network in networks if (subnet := self.subnet(network)) for each in subnet)
        return {*ends, *(each for network in networks if (each := self.gateway(network)) is not None)}

    def _joined(self, network: str) -> dict[str, Network]:
        """Return the networks that instances of a network reach: it, and those of its router."""
        router = self._router(network)
        names = {network, *(router.networks if router else ())}
        return {name: self._networks[name] for name in names if name in self._networks}

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

    def _gateway_for(self, mine: Port, range_: NumberRange) -> Literal["own", "pinged", "none"]:
        """Tell whether an atom is the gateway of a port's network, or is only pinged: a service endpoint there, or the
        gateway of another network that its router joins."""
        for name, network in self._joined(mine.network).items():
            if range_.low == self.gateway(network) == range_.high:
                return "own" if name == mine.network else "pinged"
        return "pinged" if any(self._services_at(mine, range_)) else "none"

    def of_peer(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets from a peering should reach: the ports of its networks that it allows, if policies do."""
        found = Expectation(ignored=self._without_promise(space))
        owners, policies = self.owners(), PolicyReference(self.intent, self.version, space.services)
        services = _Services(self.version, space.services)
        usual = sum(1 << n for n, each in enumerate(space.services) if is_usual(each, self.version))
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
                        found.require(place_of(owner), (passing & usual) << cell)
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

    def of_uplink(self, space: Space) -> Expectation:
        """Return what packets from the uplink should reach: published ports, and nothing else that they begin."""
        found = Expectation(ignored=self._without_promise(space))
        self._add_published(found, space)
        return found

    def _is_inside(self, range_: NumberRange) -> bool:
        """Whether addresses are in one of the tenant's networks."""
        subnets = [self.subnet(network) for network in self._networks.values()]
        return any(subnet and overlap(subnet, range_) for subnet in subnets)

    def _without_promise(self, space: Space) -> int:
        """Return the classes whose destination is multicast or broadcast."""
        subnets = [self.subnet(network) for network in self._networks.values()] if self.version == 4 else []
        return self._outside.without_promise(space, [NumberRange(each.high, each.high) for each in subnets if each])


class HostReference:
    """The reference model of the host between tenants: it forwards from each to the outside, and to the published ports
    of the `intents`, and nothing else.

    Tenants' resolvers ask the host's name servers, which are outside, at ports of the host's end of their uplink.
    """

    def __init__(self, version: int, reserved: Iterable[str], intents: Sequence[TenantIntent] = ()) -> None:
        self.version = version
        self._published = [
            (published, intent.tenant.name)
            for intent in intents
            for published, _ in reference_outside.published(intent, version)
        ]
        self._outside = Outside(version, reserved)

    def cut(self, into: Boundaries) -> None:
        """Add the boundaries of what is outside, and of the ports that stand for name servers."""
        self._outside.cut(into)
        for protocol in (TCP, UDP):
            into.targets[protocol].add(*_RESOLVERS)
        reference_outside.cut((published for published, _ in self._published), into)

    def of_uplinks(self, space: Space, senders: Sequence[PacketSource]) -> Expectation:
        """Return what packets of tenants should reach. Those with another address than their uplink's need reach
        nothing."""
        found = Expectation(ignored=self._outside.without_promise(space))
        usual = sum(1 << n for n, each in enumerate(space.services) if is_usual(each, self.version))
        servers = sum(1 << n for n, each in enumerate(space.services) if _is_to_name_server(each))
        for target, range_ in enumerate(space.targets):
            required = self._outside.has(range_) and not self._outside.may_be_closed(range_)
            for number, sender in enumerate(senders):
                cell = space.cell(number, target)
                if not self._outside.is_reserved(range_):
                    found.permit(NetworkPlace("outside"), (1 << len(space.services)) - 1 << cell)
                else:
                    found.permit(NetworkPlace("outside"), servers << cell)
                if sender.address is not None and required:
                    found.require(NetworkPlace("outside"), usual << cell)
        self._add_published(found, space)
        return found

    def _add_published(self, found: Expectation, space: Space) -> None:
        """Add what published ports permit."""
        for published, tenant in self._published:
            passing = reference_outside.classes(published, space.services)
            for target in range(len(space.targets)):
                for sender in range(space.sources):
                    found.permit(NetworkPlace("tenant", tenant), passing << space.cell(sender, target))
                    found.excuse(passing << space.cell(sender, target))

    def of_others(self, space: Space) -> Expectation:
        """Return what packets of others should reach: published ports, and else the host does as it likes."""
        found = Expectation(ignored=self._outside.without_promise(space))
        self._add_published(found, space)
        for place in (NetworkPlace("host"), NetworkPlace("outside")):
            found.permit(place, space.all)
        return found


class Outside:
    """The addresses that are outside of this host. `reserved` are ranges of the fabric in CIDR notation."""

    def __init__(self, version: int, reserved: Iterable[str]) -> None:
        self.version = version
        self._reserved = [range_of(each) for each in reserved if (":" in each) == (version == 6)]
        self._inner = [*self._reserved, *(range_of(each) for each in _SPECIAL[version])]
        self._closed = [range_of(each) for each in _CLOSED[version]]
        self._groups = [range_of(each) for each in _GROUPS[version]]

    def cut(self, into: Boundaries) -> None:
        """Add the boundaries of these ranges."""
        for each in (*self._inner, *self._closed, *self._groups):
            into.addresses.add(*each)

    def has(self, range_: NumberRange) -> bool:
        """Whether all of these addresses are outside."""
        return not any(overlap(each, range_) for each in self._inner)

    def is_special(self, range_: NumberRange) -> bool:
        """Whether some of these addresses are none of a station's, or of one that is near."""
        return any(overlap(each, range_) for each in self._inner)

    def is_reserved(self, range_: NumberRange) -> bool:
        """Whether some of these addresses belong to the fabric."""
        return any(overlap(each, range_) for each in self._reserved)

    def may_be_closed(self, range_: NumberRange) -> bool:
        """Whether the operator of a host may keep tenants from some of these addresses: services of a cloud that give
        secrets to its machines, the host's own addresses, and documentation."""
        return any(overlap(each, range_) for each in self._closed)

    def without_promise(self, space: Space, more: Sequence[NumberRange] = ()) -> int:
        """Return the classes whose destination is multicast or broadcast."""
        found = 0
        for number, range_ in enumerate(space.targets):
            if any(overlap(each, range_) for each in (*self._groups, *more)):
                found |= space.of_target(number)
        return found


def is_usual(service: Service, version: int) -> bool:
    """Whether a service is one that fabrics have to carry: TCP, UDP, and ICMP echo."""
    if service.protocol == (TCP, TCP):
        return True
    if service.protocol == (UDP, UDP):
        return service.source is not None and not service.source.low <= _SERVERS[version] <= service.source.high
    echo = ECHO[version]
    return service.is_icmp and service.target == (echo, echo) and service.code is not None and service.code.low == 0


def _is_to_name_server(service: Service) -> bool:
    """Whether a service is one of the ports that stand for the host's name servers."""
    is_dns = service.protocol in ((TCP, TCP), (UDP, UDP))
    return is_dns and service.target is not None and contains(_RESOLVERS, service.target)


class _ToRouter(NamedTuple):
    """Services that a router has to answer, and that it may."""

    required: int
    permitted: int


class _Services:
    """Sets of services of a space."""

    def __init__(self, version: int, services: Sequence[Service]) -> None:
        echo, icmp = ECHO[version], ICMP if version == 4 else ICMPV6
        self._resolvers = self.ignored = self.of_resolver = self._echo = self._near = self._usual = 0
        for number, each in enumerate(services):
            if version == 6 and each.is_icmp and each.target in [(n, n) for n in _NEIGHBOURS]:
                self.ignored |= 1 << number  # unless it is from the same link (RFC 4861, section 7.1)
            self._usual |= is_usual(each, version) << number
            if each.protocol in ((TCP, TCP), (UDP, UDP)) and each.target == (_DNS, _DNS):
                self.of_resolver |= 1 << number
            elif each.has_ports and each.target and contains(_RESOLVERS, each.target):
                self._resolvers |= 1 << number
            elif each.protocol == (icmp, icmp) and each.target == (echo, echo):
                self._echo |= 1 << number
            elif (version == 6 and each.is_icmp and each.target in [(n, n) for n in _NEIGHBOURS]) or (
                each.source and each.target and (each.source.low, each.target.low) in _CLIENTS
            ):
                self._near |= 1 << number

    def of_router(self, gateway: Literal["own", "pinged", "none"]) -> _ToRouter:
        """Return the services of a gateway, which answers echo requests, and its own network's DNS queries. Any address
        of the router may be asked by neighbor discovery and DHCP."""
        answered = {"own": self.of_resolver | self._echo, "pinged": self._echo, "none": 0}[gateway]
        further = self._resolvers if gateway == "own" else 0
        return _ToRouter(answered & self._usual, answered | further | self._near)


def place_of(port: Port) -> NetworkPlace:
    """Return the place of a port."""
    return NetworkPlace("port", port_name(port))
