"""Follow one packet through the installed state: the interpreter with a single class of packets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from insula.network.interpreter.delivery import Delivery, NetworkPlace
from insula.network.interpreter.machine import Passage
from insula.network.interpreter.space import NumberRange, Space
from insula.network.interpreter.tracing import TracedPacket, TracedRule, TracedWay
from insula.network.linux.interpreter.forwarding import Forwarding
from insula.network.linux.interpreter.host import HostInterpreter, UplinkView
from insula.network.linux.interpreter.tenant import TenantInterpreter
from insula.network.ranges import contains

_HANDLE = re.compile(r"\s*(.*?) # handle (\d+)$")
Listing = Callable[[str, str], str]
"""Returns a table, by family and name, as nft lists it with handles."""


def trace_tenant(interpreter: TenantInterpreter, packet: TracedPacket, listing: Listing) -> TracedWay:
    """Follow a packet from a port, a peer or the uplink through the tenant's namespace."""
    view = interpreter.view
    run, delivery = _run(interpreter.run, packet)
    device = _arrival(interpreter, packet)
    link = interpreter.stack.by_name.get(device) if device else None
    if packet.source.place.kind == "port":
        if link is not None:
            run.from_bridge_ports([link], view.owners[packet.version])
    else:
        run.from_devices([link])
    return _way(run, delivery, _RuleTexts(listing).of)


def _arrival(interpreter: TenantInterpreter, packet: TracedPacket) -> str | None:
    """Return the device by which a packet comes: those of a peer's ports on other hosts by the peering's own one."""
    source, peers = packet.source, interpreter.view.peers
    if source.place.kind != "peer" or source.address is None:
        return next((device for device, place in interpreter.places.items() if place == source.place), None)
    sent = source.address
    return next(
        (
            device
            for device in reversed(peers)
            for place, ranges in [peers[device]]
            if place == source.place and any(contains(each, sent) for each in ranges[packet.version])
        ),
        None,
    )


def trace_host(interpreter: HostInterpreter, uplink: UplinkView, packet: TracedPacket) -> TracedWay:
    """Follow a packet from a tenant's uplink, or with the place ``outside`` from elsewhere, through the host. The
    texts of the host's rules are not told: they are no tenant's."""
    inward = packet.source.place.kind != "tenant"
    run, delivery = _run(lambda d, trace: Forwarding(interpreter.stack, d, interpreter.places, trace=trace), packet)
    run.from_devices([None if inward else interpreter.stack.by_name.get(uplink.device)])
    if (here := delivery.ends.pop(NetworkPlace("router"), 0)) != 0:
        delivery.add(NetworkPlace("host"), here)
    return _way(run, delivery, lambda _: "")


def _run(make: Callable[..., Forwarding], packet: TracedPacket) -> tuple[Forwarding, Delivery]:
    space = Space(1, [NumberRange(packet.target, packet.target)], [packet.service])
    delivery = Delivery(packet.version, [packet.source], space)
    return make(delivery, trace=True), delivery


def _way(run: Forwarding, delivery: Delivery, text: Callable[[Passage], str]) -> TracedWay:
    rules = [
        TracedRule(f"{passage.family} {passage.table} {passage.chain}", passage.verdict, text(passage))
        for passage in run.machine.passages or ()
    ]
    return TracedWay(list(delivery.ends), list(_devices(run)), rules, sorted(delivery.unknown))


def _devices(run: Forwarding) -> Iterator[str]:
    """Yield the devices by which the router may send the packet on."""
    known = set()
    for _, hop, _ in run.routes:
        link = run.stack.links.get(hop.device) if hop else None
        if link and link.name not in known:
            known.add(link.name)
            yield link.name


class _RuleTexts:
    """The texts of rules. Each table is listed once, when a rule of it is asked for."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._tables: dict[tuple[str, str], dict[int, str]] = {}

    def of(self, passage: Passage) -> str:
        """Return the text of the rule that a packet has matched."""
        if not passage.handle:
            return "policy drop"
        table = passage.family, passage.table
        if table not in self._tables:
            found = map(_HANDLE.match, self._listing(*table).splitlines())
            self._tables[table] = {int(each[2]): each[1] for each in found if each}
        return self._tables[table].get(passage.handle, "")
