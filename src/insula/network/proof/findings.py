"""Differences between what is installed and what is wanted, each with a packet as its witness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

from insula.network.endpoints import port_name
from insula.network.intent import TenantIntent
from insula.network.interpreter.connections import OpenConnection
from insula.network.interpreter.delivery import Delivery, NetworkPlace, PacketSource
from insula.network.interpreter.fields import describe
from insula.network.interpreter.interpretation import Forgery, Overheard
from insula.network.interpreter.space import ECHO, ICMP, ICMPV6, TCP, UDP, NumberRange, Service, Space
from insula.network.ranges import address_text

FindingKind = Literal["leak", "blocked", "forged", "overheard", "misqueued", "unknown"]
_SOURCE_PORT: Final = 40000
_USUAL_PORTS: Final = (80, 443, 22, 9)
_SHOWN: Final = 8  # services in a text


class Witness(NamedTuple):
    """A packet that shows a difference. `port` is that of TCP or UDP, or the ICMP type. An address may be ""."""

    version: int
    source: str
    target: str
    protocol: int
    source_port: int = 0
    port: int = 0

    @property
    def text(self) -> str:
        name = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmp"}.get(self.protocol)
        how = f"{name}/{self.port}" if name else f"protocol {self.protocol}"
        return f"{how} from {self.source or 'any address'} to {self.target}"


class ProofFinding(NamedTuple):
    """A way in which the installed state differs from the intent.

    A ``leak`` lets packets come where they may not, ``blocked`` keeps them from where they should, ``forged`` lets a
    port send from an address that is not its own, ``overheard`` gives a port frames that are for others, ``misqueued``
    has packets in a queue that is not their tenant's, and ``unknown`` is something that the interpreter does not
    understand, which counts as if it let everything pass.
    `source` and `target` are labels as in `endpoints.Endpoint`; `classes` is the number of packet classes.
    """

    tenant: str
    kind: FindingKind
    source: str
    target: str
    classes: int
    witness: Witness | None
    text: str


def label(tenant: str, place: NetworkPlace) -> str:
    """Return the name of a place for people."""
    if place.kind == "port":
        return f"{tenant}/{place.name}"
    if place.kind == "router":
        return f"{tenant}/router"
    if place.kind in ("uplink", "untranslated"):
        return "outside"
    if place.kind == "device":
        return f"{tenant}/device:{place.name}"
    if place.kind == "overlay":
        return f"{tenant}/{place.name} on other hosts"
    return place.name if place.kind in ("tenant", "peer") else place.kind


def between(
    tenant: str, kind: Literal["leak", "blocked"], delivery: Delivery, place: NetworkPlace, classes: int
) -> Iterator[ProofFinding]:
    """Yield a finding for each place from which these classes come that end, or should end, at `place`."""
    space = delivery.space
    found: dict[str, ProofFinding] = {}
    for number, sender in enumerate(delivery.senders) if classes else ():
        if not (row := space.row(classes, number)):
            continue
        source, end = label(tenant, sender.place), label(tenant, place)
        if source in found:
            found[source] = found[source]._replace(classes=found[source].classes + row.bit_count())
            continue
        target, service = _best(space, row, delivery.version, datagrams=delivery.to_groups)
        packet = _packet(delivery.version, sender.address, target, service)
        if kind == "leak":
            text = f"{source} can reach {end}{_how(place, sender)}, and should not: {packet.text}"
        else:
            text = f"{source} should reach {end}{_how(place, sender)}, and can't: {packet.text}"
        text += f" ({_services(space, row)})"
        found[source] = ProofFinding(tenant, kind, source, end, row.bit_count(), packet, text)
    yield from found.values()


def _how(place: NetworkPlace, sender: PacketSource) -> str:
    """Return in words how packets come to a place: with which address after translation, or without one."""
    if place.kind == "untranslated":
        own = sender.address is not None and place.address == address_text(_version(place), sender.address.low)
        return ", with its own source address" if own else f", from the address {place.address or 'of anybody'}"
    return f" by translation to {place.address}" if place.address else ""


def _version(place: NetworkPlace) -> int:
    return 6 if ":" in place.address else 4


def forged(tenant: str, forgeries: Sequence[Forgery]) -> Iterator[ProofFinding]:
    """Yield a difference for each port that may send from addresses that are not its own."""
    by_port: dict[tuple[str, int, str, bool], list[Forgery]] = {}
    for each in forgeries:
        by_port.setdefault((each.port, each.version, each.protocol, each.mac), []).append(each)
    for (port, version, protocol, mac), some in by_port.items():
        one = min(some, key=lambda each: (each.address.low != each.address.high, each.address.low == 0, each))
        address = address_text(version, one.address.low)
        what = {"ip": "packets", "arp": "ARP messages", "nd": "neighbor advertisements"}[protocol]
        other = " and another MAC address" if mac else ""
        text = f"{tenant}/{port} can send {what} with address {address}{other}, which is not its own"
        packet = Witness(version, address, "", UDP if protocol == "ip" else 0)
        yield ProofFinding(tenant, "forged", f"{tenant}/{port}", "", len(some), packet, text)


def overheard(tenant: str, found: Sequence[Overheard]) -> Iterator[ProofFinding]:
    """Yield a difference for each port that receives frames for others."""
    for each in found:
        packet = Witness(0, "", each.mac, 0)
        text = f"{tenant}: {each.why}: a frame of {each.sender} to {each.mac} comes to {each.receiver}"
        yield ProofFinding(tenant, "overheard", f"{tenant}/{each.sender}", f"{tenant}/{each.receiver}", 1, packet, text)


def open_connections(intent: TenantIntent, forbidden: Sequence[OpenConnection]) -> Iterator[ProofFinding]:
    """Yield a difference for each connection that goes on although it should not. No packet is its witness: it would
    disturb the connection."""
    tenant = intent.tenant.name
    names = {a: f"{tenant}/{port_name(p)}" for p in intent.ports for a in (p.address, p.address6) if a}
    for each in forbidden:
        packet = Witness(0, each.source, each.target, each.protocol, each.source_port, each.port)
        source, target = names.get(each.source, "outside"), names.get(each.to, "outside")
        how = f"{packet.text} (source port {each.source_port})" if each.source_port else packet.text
        text = f"{source} has an open connection to {target} that is not allowed: {how}"
        yield ProofFinding(tenant, "leak", source, target, 1, None, text)


def unknown(tenant: str, found: set[str]) -> Iterator[ProofFinding]:
    """Yield a difference for each thing that was not understood."""
    for what in sorted(found):
        text = f"{tenant}: {what} is not understood, and counts as if it let everything pass"
        yield ProofFinding(tenant, "unknown", tenant, "", 1, None, text)


# -- the witness ---------------------------------------------------------------------------------------------------


def _best(space: Space, row: int, version: int, *, datagrams: bool) -> tuple[NumberRange, Service]:
    """Return the class that makes the best example: one known address, and a service that everybody knows, with
    `datagrams` not TCP if there is another."""
    one = Space(1, space.targets, space.services)
    single = 0
    for number, range_ in enumerate(space.targets):
        if range_.low == range_.high:
            single |= one.of_target(number)
    icmp = ICMP if version == 4 else ICMPV6
    for wanted in (UDP, icmp, TCP) if datagrams else (TCP, UDP, icmp):
        usual = sum(1 << n for n, each in enumerate(space.services) if _is_usual(each, wanted, version))
        for places in (single, one.all):
            if found := row & one.of_services(usual) & places:
                _, target, service = next(one.classes(found))
                return space.targets[target], space.services[service]
    _, target, service = next(one.classes(row))
    return space.targets[target], space.services[service]


def _is_usual(service: Service, protocol: int, version: int) -> bool:
    if service.protocol != (protocol, protocol):
        return False
    if service.has_ports:
        return service.source is not None and service.source.low <= _SOURCE_PORT <= service.source.high
    return service.target == (ECHO[version], ECHO[version])


def _packet(version: int, source: NumberRange | None, target: NumberRange, service: Service) -> Witness:
    port = source_port = 0
    if service.target:
        usual = [each for each in _USUAL_PORTS if service.target.low <= each <= service.target.high]
        port = usual[0] if service.has_ports and usual else service.target.low
    if service.source:
        low, high = service.source
        source_port = _SOURCE_PORT if low <= _SOURCE_PORT <= high else low
    return Witness(
        version=version,
        source=address_text(version, source.low) if source else "",
        target=address_text(version, target.low),
        protocol=service.protocol.low,
        source_port=source_port,
        port=port,
    )


def _services(space: Space, row: int) -> str:
    bits = 0
    for target in range(len(space.targets)):
        bits |= space.services_of(row, 0, target)
    some = [each for n, one in enumerate(space.services) if bits >> n & 1 for each in (one, *one.alike)]
    names = list(dict.fromkeys(describe(each) for each in some))
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
