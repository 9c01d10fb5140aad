"""`insula trace`: whether a packet passes, by the installed rules and by the intent, and why, in the tenant's words.

The decision is a single class of the proof: the fabric's interpreter follows the packet through what is installed. The
reasons come from the intent: networks, routers, routes, peerings and policies. If the two disagree, that is told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from insula.model.errors import Invalid, NotFound
from insula.model.objects import Network, Port
from insula.model.peerings import DOMAIN
from insula.model.policies import NamePeer
from insula.model.tracing import TraceRule, TraceView
from insula.model.units import shorten
from insula.network.endpoints import port_name
from insula.network.entrances import Entrance, entrances
from insula.network.fabric import Fabric
from insula.network.intent import TenantIntent
from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import ECHO, ICMP, ICMPV6, TCP, UDP, NumberRange, Service, Space
from insula.network.interpreter.tracing import TracedPacket, TracedRule, TracedWay
from insula.network.live import LivePacket, LiveTest, in_words
from insula.network.ranges import contains, overlap, range_of
from insula.network.reference import policy_model
from insula.network.reference.model import ReferenceModel
from insula.network.tracing.ends import TraceEnd, holders
from insula.network.tracing.queues import queues_of

_NUMBERS: Final = {"tcp": TCP, "udp": UDP}
_ANYWHERE: Final = {4: "1.1.1.1", 6: "2606:4700:4700::1111"}  # stands for the whole internet, as in a table of routes
_SOURCE_PORT: Final = 40000


@dataclass(frozen=True)
class TraceRequest:
    source: TraceEnd
    target: TraceEnd
    protocol: str
    port: int | None

    @property
    def version(self) -> int:
        return 6 if ":" in self.target.address else 4

    @property
    def service(self) -> str:
        return f"{self.protocol}/{self.port}" if self.port is not None else self.protocol


# -- the request -----------------------------------------------------------------------------------------------------


def parse(intent: TenantIntent, source: str, target: str, service: str) -> TraceRequest:
    """Return the request that texts stand for. Invalid, NotFound.

    An end is an instance, "instance:interface", an instance of a peer as in "db.acme.peer", an address, or "outside"; a
    service is as in tcp/80, udp/53 or icmp.
    """
    protocol, port = _service(service)
    version = 4 if all(4 in _versions(intent, each) for each in (source, target)) else 6
    ends = [_end(intent, text, version) for text in (source, target)]
    if ends[0].port is None and ends[1].port is None:
        raise Invalid("neither end is one of the tenant's instances", "`insula ps` lists them")
    return TraceRequest(ends[0], ends[1], protocol, port)


def _service(text: str) -> tuple[str, int | None]:
    name, slash, number = text.partition("/")
    if name == "icmp" and not slash:
        return name, None
    if name in _NUMBERS and number.isascii() and number.isdigit() and 0 < int(number) < 1 << 16:
        return name, int(number)
    raise Invalid(f"{shorten(text)} is not a service", "use tcp/PORT, udp/PORT or icmp, as in tcp/80")


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _versions(intent: TenantIntent, text: str) -> Collection[int]:
    """The IP versions that an end has addresses of; both if it is unknown, or anywhere outside."""
    if _is_address(text):
        return {6 if ":" in text else 4}
    found = _port(intent, text)
    addresses = [found.address, found.address6] if found else _beyond(intent, text)
    return {6 if ":" in each else 4 for each in addresses if each} or {4, 6}


def _beyond(intent: TenantIntent, name: str) -> Sequence[str]:
    """The addresses of an instance of a peer, by its name here, as the resolver answers it; empty if there is none."""
    for each in intent.peerings:
        instance = name.removesuffix(f".{each.peer.name}.{DOMAIN}")
        if instance != name and instance in each.names:
            return each.names[instance]
    return ()


def _port(intent: TenantIntent, name: str) -> Port | None:
    ports = [port for port in intent.ports if name in (port_name(port), f"{port.instance}:{port.interface}")]
    return ports[0] if ports else next((port for port in intent.ports if port.instance == name), None)


def _end(intent: TenantIntent, text: str, version: int) -> TraceEnd:
    if text in ("outside", "host"):
        return TraceEnd(text, _ANYWHERE[version])
    if _is_address(text):
        address = str(ip_address(text))
        if (":" in address) != (version == 6):
            raise Invalid(f"{address} is no IPv{version} address, and the other end is one", "use one version of IP")
        owner, mac = next(iter(holders(intent, address)), (None, None))
        gateway = next((n for n in intent.networks if address in (n.gateway, n.gateway6)), None)
        return TraceEnd(text, address, owner, gateway, mac)
    if beyond := _beyond(intent, text):
        return TraceEnd(text, _of_version(beyond, version, text))
    port = _port(intent, text)
    if port is None:
        raise NotFound(
            f"there is no instance {shorten(text)} with a network on this host", "`insula ps -a` lists instances"
        )
    return TraceEnd(text, _of_version((port.address, port.address6), version, port_name(port)), port, mac=port.mac)


def _of_version(addresses: Sequence[str | None], version: int, name: str) -> str:
    for each in addresses:
        if each and (":" in each) == (version == 6):
            return each
    raise Invalid(f"{name} has no IPv{version} address", "give addresses of one version of IP")


# -- the answer ------------------------------------------------------------------------------------------------------


def trace(
    fabric: Fabric, intent: TenantIntent, asked: TraceRequest, running: Collection[int], *, rules: bool = False
) -> TraceView:
    """Follow the packet, and explain it. `running` are the indices of the ports that are plugged. With `rules` the
    installed rules that decided are told, too."""
    entries = fabric.entries([intent.tenant])[intent.tenant.name]
    entrance = _entrance(fabric, intent, asked)
    model = ReferenceModel(intent, asked.version, fabric.reserved, running, entries, fabric.between_peers)
    ways = _follow(fabric, intent, asked, model, entrance)
    refused = _refused_beyond(intent, asked)
    allowed = _passes(ways, asked) and not refused
    required, permitted = (False, False) if refused else _expected(model, asked, entrance)
    steps = [*_explained(intent, asked, model, entrance)]
    stopped = [end for end in (asked.source, asked.target) if end.port and end.port.index not in running]
    steps += [f"{end.words} does not run" for end in stopped]
    at_host = len(ways) > 1 and asked.source.port is not None
    wanted = permitted if allowed or stopped else required
    if at_host and permitted and not allowed:
        steps.append("but the host does not forward packets to that address")
        wanted = False
    elif allowed != wanted and not stopped:
        word = "let it pass" if allowed else "drop it"
        steps.append(f"but the installed rules {word}: this host has drifted; see `insula verify`")
    unknown = [what for way in ways for what in way.unknown]
    steps += [f"{what} is not understood, and counts as if it let the packet pass" for what in unknown]
    hit = [each for way in ways for each in way.rules]
    if allowed:
        for text, name in queues_of(fabric, intent.tenant, asked.source, asked.target, outside=len(ways) > 1):
            steps.append(text)
            hit.append(TracedRule(f"queue {name}", "wait", ""))
    return TraceView(
        source=asked.source.name,
        target=asked.target.name,
        source_address=asked.source.address,
        target_address=asked.target.address,
        service=asked.service,
        allowed=allowed,
        wanted=wanted,
        steps=steps,
        rules=[TraceRule(where=each.where, verdict=each.verdict, text=each.text) for each in hit if rules],
    )


def _entrance(fabric: Fabric, intent: TenantIntent, asked: TraceRequest) -> Entrance | None:
    """What leads from the outside to the target; None if nothing does, or the packet comes from elsewhere."""
    if asked.source.name not in ("outside", "host") or not asked.target.port or asked.port is None:
        return None
    entries = fabric.entries([intent.tenant])[intent.tenant.name]
    return next(entrances(intent.outside, entries, asked.target.address, asked.protocol, asked.port), None)


def _follow(
    fabric: Fabric, intent: TenantIntent, asked: TraceRequest, model: ReferenceModel, entrance: Entrance | None
) -> list[TracedWay]:
    """Follow the packet through the tenant's part, and through the host before or after it."""
    tenant, source, target = intent.tenant, int(ip_address(asked.source.address)), int(ip_address(asked.target.address))
    service = _one_service(asked)
    peer = model.peer_at(NumberRange(source, source))
    if asked.source.port:
        place = model.place_of(asked.source.port)
    else:
        place = NetworkPlace("peer", peer) if peer else NetworkPlace("uplink")
    sender = PacketSource(place, NumberRange(source, source), asked.source.mac)
    packet = TracedPacket(asked.version, sender, target, service)
    found: list[TracedWay] = []
    if place.kind == "uplink":
        outer = packet._replace(source=PacketSource(NetworkPlace("outside"), sender.address))
        if entrance:
            service = _one_service(asked, entrance.port)
            outer = outer._replace(target=int(ip_address(entrance.address)), service=service)
            packet = packet._replace(target=int(ip_address(entrance.inner)), service=service)
        found.append(fabric.trace_host(tenant, outer))
        if not any(end.kind == "tenant" for end in found[0].ends):
            return found
    found.append(fabric.trace(tenant, intent, packet))
    if leaving := next((end for end in found[-1].ends if end.kind in ("uplink", "untranslated")), None):
        own = _atom(leaving.address) if leaving.address else None  # a floating address, which the host leaves as it is
        outer = packet._replace(source=PacketSource(NetworkPlace("tenant", tenant.name), own))
        found.append(fabric.trace_host(tenant, outer))
    return found


def _one_service(asked: TraceRequest, external: int | None = None) -> Service:
    """The packet's service; `external` is the port outside that is translated to the one that was asked for."""
    zero = NumberRange(0, 0)
    if asked.protocol == "icmp":
        number, echo = ICMP if asked.version == 4 else ICMPV6, ECHO[asked.version]
        return Service(NumberRange(number, number), None, NumberRange(echo, echo), zero)
    number, port = _NUMBERS[asked.protocol], external or asked.port or 0
    return Service(NumberRange(number, number), NumberRange(_SOURCE_PORT, _SOURCE_PORT), NumberRange(port, port))


def _passes(ways: Sequence[TracedWay], asked: TraceRequest) -> bool:
    """Whether the packet comes to its target."""
    ends = ways[-1].ends
    if asked.target.port:
        return any(end.kind == "port" for end in ends)
    if asked.target.gateway:
        return any(end.kind == "router" for end in ends)
    return any(end.kind in ("outside", "peer", "overlay", "port") for end in ends)


def _refused_beyond(intent: TenantIntent, asked: TraceRequest) -> str | None:
    """The tenant beyond a peering that does not open the service there; None if it does, or if there is none.

    Its rules are in its own part, which is not followed: they are the other tenant's affair.
    """
    if asked.source.port is None:
        return None
    protocol, port = _matched(asked)
    for peering in intent.peerings:
        subnets = [subnet for network in peering.others for subnet in _subnets(network, asked)]
        if any(contains(range_of(each), _atom(asked.target.address)) for each in subnets):
            opened = any(policy_model.is_port(each, protocol, port) for each in peering.opened)
            return None if opened else peering.peer.name
    return None


def _expected(model: ReferenceModel, asked: TraceRequest, entrance: Entrance | None) -> tuple[bool, bool]:
    """Whether the packet has to come somewhere, by the intent, and whether it may. It only may to an address that is
    reached by a DNS name, for example, since nobody knows whether the name was asked for."""
    source, target = int(ip_address(asked.source.address)), int(ip_address(asked.target.address))
    space = Space(1, [NumberRange(target, target)], [_one_service(asked)])
    peer = None if asked.source.port else model.peer_at(NumberRange(source, source))
    if asked.source.port:
        sender = PacketSource(model.place_of(asked.source.port), NumberRange(source, source))
        expected = model.of_ports(space, [sender])
    elif peer:
        sender = PacketSource(NetworkPlace("peer", peer), NumberRange(source, source))
        expected = model.of_peer(space, [sender])
    else:
        sender = PacketSource(NetworkPlace("uplink"), NumberRange(source, source))
        if entrance:
            inner = int(ip_address(entrance.inner))
            space = Space(1, [NumberRange(inner, inner)], [_one_service(asked, entrance.port)])
        expected = model.of_uplink(space, [sender])
    return any(expected.required.values()), any(expected.permitted.values())


def live(fabric: Fabric, intent: TenantIntent, asked: TraceRequest, ports: Sequence[Port]) -> str:
    """Send the packet, and return in words where it was seen last. `ports` are those of the tenant that are plugged.
    Invalid if the source is no instance that runs; Unavailable if this kernel can't inject packets."""
    if asked.source.port is None or asked.source.port.index not in {port.index for port in ports}:
        raise Invalid("a packet can only be sent from an instance that runs", "leave out --live, or start it")
    points = fabric.probe_points(intent.tenant, intent.networks, ports)
    try:
        station = next(each for each in points.stations if asked.source.address in [e.address for e in each.endpoints])
        target = asked.target.port
        near = target is not None and target.network == asked.source.port.network
        with LiveTest([points]) as test:
            packet = LivePacket(
                asked.source.address, asked.target.address, asked.protocol, _SOURCE_PORT, asked.port or 0
            )
            return in_words(test.from_port(station, packet, [target.mac] if target and near else []))
    finally:
        points.close()


# -- the reasons -----------------------------------------------------------------------------------------------------


def _explained(
    intent: TenantIntent, asked: TraceRequest, model: ReferenceModel, entrance: Entrance | None
) -> Iterator[str]:
    networks = {network.name: network for network in intent.networks}
    if asked.source.port:
        yield f"{asked.source.words} is on network {asked.source.port.network}"
    path, open_ = ([entrance.words], True) if entrance else _path(intent, asked, networks, model)
    yield from path
    if not open_:
        return
    if asked.target.gateway and asked.target.port is None:
        served = asked.protocol == "icmp" or asked.port == 53
        yield "a gateway answers echo requests, and DNS queries of its own network" + (
            "" if served else "; nothing else"
        )
        return
    yield from _policies(intent, asked)


def _path(
    intent: TenantIntent, asked: TraceRequest, networks: Mapping[str, Network], model: ReferenceModel
) -> tuple[list[str], bool]:
    """Return the reasons for and against a path, and whether there is one."""
    source, target = asked.source.port, asked.target.port
    there = target.network if target else asked.target.gateway.name if asked.target.gateway else None
    if source is None:
        peer = model.peer_at(_atom(asked.source.address))
        if peer is None:
            return ["no published port, floating address or load balancer leads there from the outside"], False
        return [f"{asked.source.words} is in a network of {peer}, which this tenant has a peering with"], True
    if there == source.network:
        return [f"{asked.target.words} is on the same network"], True
    router = next((each for each in intent.routers if source.network in each.networks), None)
    if there is not None:
        if router and there in router.networks:
            return [f"router {router.name} joins networks {source.network} and {there}"], True
        return [f"no router joins networks {source.network} and {there}"], False
    if any(overlap(range_of(s), _atom(asked.target.address)) for n in networks.values() for s in _subnets(n, asked)):
        return [f"no instance on this host has the address {asked.target.address}"], False
    if peer := model.peer_at(_atom(asked.target.address)):
        reasons = [f"{asked.target.words} is in a network of {peer}, by a peering"]
        if _refused_beyond(intent, asked):
            return [*reasons, f"{peer} does not open {asked.service} there"], False
        return [*reasons, f"{peer} opens {asked.service} there, but its own policies may deny it"], True
    for route in sorted(router.routes if router else (), key=lambda r: -int(r.destination.partition("/")[2])):
        here = (":" in route.destination) == (asked.version == 6)
        if here and contains(range_of(route.destination), _atom(asked.target.address)):
            assert router is not None
            return [f"router {router.name} has a route to {route.destination} via {route.next_hop}"], True
    if networks[source.network].outbound != "nat":
        return [f"network {source.network} has no way out"], False
    floating = [each.address for each in intent.outside.floating if each.target == asked.source.address]
    becomes = f"the floating address {floating[0]}" if floating else "the host's"
    return [f"network {source.network} has a way out, where the source address becomes {becomes} (NAT)"], True


def _atom(address: str) -> NumberRange:
    number = int(ip_address(address))
    return NumberRange(number, number)


def _subnets(network: Network, asked: TraceRequest) -> list[str]:
    found = [network.subnet if asked.version == 4 else network.subnet6]
    return [each for each in found if each]


def _matched(asked: TraceRequest) -> tuple[str, int | None]:
    """The protocol and the port, or the type of an echo request, that rules match."""
    protocol = "icmpv6" if asked.protocol == "icmp" and asked.version == 6 else asked.protocol
    return protocol, ECHO[asked.version] if asked.protocol == "icmp" else asked.port


def _policies(intent: TenantIntent, asked: TraceRequest) -> Iterator[str]:
    protocol, port = _matched(asked)
    verdict = policy_model.judge(intent, asked.source.address, asked.target.address, protocol, port)
    names = ", ".join(verdict.policies)
    if verdict.tier == "operator":
        yield f"the operator's policy {names} {'allows' if verdict.allowed else 'denies'} it"
    elif verdict.allowed:
        yield (
            f"it is allowed by {_plural('policy', verdict.policies)} {names}"
            if names
            else "no policy selects either end"
        )
    elif verdict.tier in ("out", "in"):
        who = asked.source.words if verdict.tier == "out" else asked.target.words
        other = f"to {asked.target.words}" if verdict.tier == "out" else f"from {asked.source.words}"
        verb = "selects" if len(verdict.policies) == 1 else "select"
        direction = "outgoing" if verdict.tier == "out" else "incoming"
        yield (
            f"{_plural('policy', verdict.policies)} {names} {verb} {who} for {direction} connections, "
            f"and no rule there allows {asked.service} {other}"
        )
        if verdict.tier == "out" and (named := _names(intent, verdict.policies, protocol, port)):
            yield f"{asked.service} is open to addresses of {', '.join(named)}, once {who} has asked for the name"
    elif some := [port_name(port) for port, _ in holders(intent, asked.source.address)]:
        yield (
            f"{', '.join(some)} may all use {asked.source.address}, and differ in labels or network: policies can't "
            "tell whose packets come from there, and nothing may"
        )
    else:
        yield f"no instance has the address {asked.source.address}"


def _names(intent: TenantIntent, policies: Collection[str], protocol: str, port: int | None) -> list[str]:
    """The DNS names to which rules of these policies open a service."""
    rules = [rule for each in intent.policy.policies if each.name in policies for rule in each.rules]
    opening = [
        rule
        for rule in rules
        if rule.direction == "out"
        and (not rule.ports or any(policy_model.is_port(each, protocol, port) for each in rule.ports))
    ]
    return sorted({peer.name for rule in opening for peer in rule.peers if isinstance(peer, NamePeer)})


def _plural(word: str, items: Sequence[str]) -> str:
    return word if len(items) == 1 else f"{word[:-1]}ies"
