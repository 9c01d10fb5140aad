"""Interpret the installed state of one tenant on this host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from insula.kernel.netlink.messages import Link
from insula.network.interpreter.alike import representatives
from insula.network.interpreter.boundaries import collect
from insula.network.interpreter.connections import judged_marks
from insula.network.interpreter.delivery import Delivery, NetworkPlace, PacketSource
from insula.network.interpreter.interpretation import Interpretation, Overheard
from insula.network.interpreter.space import Space
from insula.network.linux.interpreter.forwarding import Forwarding
from insula.network.linux.interpreter.groups import Flooding
from insula.network.linux.interpreter.links import link_layer
from insula.network.linux.interpreter.spoofing import PortIdentity, Spoofing
from insula.network.linux.interpreter.stack import Stack
from insula.network.linux.interpreter.view import InterpreterView
from insula.network.ranges import contains, overlap

_NO_ONE = "02:00:00:00:00:00"
"""A MAC address that nobody has: frames to it are flooded."""
_MOST_SOURCES = 128  # addresses that are tried as sources one by one
_LARGEST = 1 << 21  # packet classes of one run; more senders are run in groups


class TenantInterpreter:
    def __init__(self, stack: Stack, view: InterpreterView) -> None:
        self.stack = stack
        self.view = view
        peers = {device: place for device, (place, _) in view.peers.items()}
        overlays = {device: NetworkPlace("overlay", network) for device, network in view.overlays.items()}
        self.places = {**view.ports, **overlays, **peers, view.uplink: NetworkPlace("uplink")}

    def interpret(self) -> Interpretation:
        """Return whom the tenant's ports and its uplink reach."""
        found = Interpretation(self.view.tenant)
        inside, above, groups = list[Delivery](), list[Delivery](), list[Delivery]()
        spoofing = Spoofing(self.stack, list(self._identities()))
        for version in self.view.cuts:
            targets = self.space(version, 1)
            inside += list(self.from_ports(version, targets))
            groups += self.to_groups(version, targets)
            above += self.from_uplink(version, targets)
            above += self.from_peers(version, targets)
        found.forgeries = sorted({each for version in self.view.cuts for each in spoofing.forgeries(version)})
        found.inside, found.above, found.groups = inside, above, groups
        found.overheard = list(self._overheard())
        found.links = link_layer(self.stack, self.view.overlays, self.view.bridges, self.places)
        found.judged = judged_marks(self.stack.program)
        found.unknown = spoofing.unknown.union(*(each.unknown for each in (*inside, *above, *groups)))
        return found

    def space(self, version: int, sources: int) -> Space:
        """Return the classes of packets that rules, routes and intent tell apart."""
        boundaries = self.view.cuts[version]
        collect(self.stack.program, boundaries)
        for route in self.stack.routing[version].routes:
            boundaries.addresses.add(*route.range)
        for of, _, address in self.stack.neighbours:
            if of == version:
                boundaries.addresses.add(address, address)
        return Space(sources, boundaries.addresses.atoms(), representatives(self.stack.program, boundaries))

    def from_ports(self, version: int, space: Space) -> Iterator[Delivery]:
        """Run packets of all ports with their own addresses."""
        senders = [(d, s) for d, s in self.view.senders.get(version, ()) if d in self.stack.by_name]
        size = max(1, _LARGEST // max(1, len(space.targets) * len(space.services)))
        for first in range(0, len(senders), size):
            some = senders[first : first + size]
            delivery = Delivery(
                version, [sender for _, sender in some], Space(len(some), space.targets, space.services)
            )
            run = self.run(delivery)
            run.from_bridge_ports([self.stack.by_name[device] for device, _ in some], self.view.owners[version])
            yield delivery

    def to_groups(self, version: int, space: Space) -> Iterator[Delivery]:
        """Run packets of all ports to the groups of their networks."""
        flooding = Flooding(self.stack, version, self.places, self.view.broadcasts[version], space)
        senders = self.view.senders.get(version, ())
        return flooding.deliveries([(self.stack.by_name[d], s) for d, s in senders if d in self.stack.by_name])

    def run(self, delivery: Delivery, *, trace: bool = False) -> Forwarding:
        """Return a run through the tenant's namespace."""
        translated = self.view.translated[delivery.version]
        return Forwarding(self.stack, delivery, self.places, trace=trace, translated=translated)

    def from_peers(self, version: int, space: Space) -> Iterator[Delivery]:
        """Run packets that come from other tenants through peerings, with any of the addresses of their networks, and
        of those that are routed there: service endpoints have such."""
        for device, (place, subnets) in self.view.peers.items():
            link = self.stack.by_name.get(device)
            routed = [
                route.range
                for route in self.stack.routing[version].routes
                if link and any(hop.device == link.index and hop.gateway is not None for hop in route.hops)
            ]
            known = [each for of, ranges in self.view.peers.values() if of == place for each in ranges[version]]
            routed = [each for each in routed if not any(overlap(each, range_) for range_ in known)]
            ranges = dict.fromkeys([*subnets[version], *routed])
            atoms = [each for each in space.targets if any(contains(range_, each) for range_ in ranges)]
            if link and atoms:
                sources = [PacketSource(place, each) for each in atoms]
                delivery = Delivery(version, sources, Space(len(sources), space.targets, space.services))
                self.run(delivery).from_devices([link] * len(sources))
                yield delivery

    def from_uplink(self, version: int, space: Space) -> Iterator[Delivery]:
        """Run packets that come from the host through the uplink, from any address. For what passes, each atom of
        addresses is tried as their source."""
        place = NetworkPlace("uplink")
        delivery = self._from_uplink(version, space, [PacketSource(place, None)])
        yield delivery
        passing = 0
        for classes in delivery.ends.values():
            passing |= classes
        if passing and len(space.targets) <= _MOST_SOURCES:
            sources = [PacketSource(place, each) for each in space.targets]
            yield self._from_uplink(version, space.part(passing), sources)

    def _from_uplink(self, version: int, space: Space, sources: list[PacketSource]) -> Delivery:
        delivery = Delivery(version, sources, Space(len(sources), space.targets, space.services))
        link = self.stack.by_name.get(self.view.uplink)
        self.run(delivery).from_devices([link] * len(sources))
        return delivery

    def _identities(self) -> Iterator[PortIdentity]:
        for each in self.view.identities:
            if link := self.stack.by_name.get(each.device):
                yield PortIdentity(self.places[each.device], link, each.mac, each.allowed)
        for each in self.view.tunnels:  # what comes from other hosts
            if (link := self.stack.by_name.get(each.device)) and link.vxlan:
                yield PortIdentity(self.places[each.device], link, each.mac, each.allowed)
        known = {each.device for each in self.view.identities}
        for link in self.stack.links.values():  # a device on a bridge that is no port of the tenant's
            if link.name not in known and link.master and self._is_bridge(link.master) and link.kind != "vxlan":
                yield PortIdentity(NetworkPlace("device", link.name), link, link.mac, {})

    def _is_bridge(self, index: int) -> bool:
        return index in self.stack.links and self.stack.links[index].kind == "bridge"

    # -- frames that are not for a port --------------------------------------------------------------------------------

    def _overheard(self) -> Iterator[Overheard]:
        """Yield ports and devices that receive frames that are not for them."""
        macs = {each.device: each.mac for each in self.view.identities}
        for bridge in [link for link in self.stack.links.values() if link.kind == "bridge"]:
            ports = self.stack.ports(bridge.index)
            names = [self.places[port.name].name for port in ports if port.name in macs]
            sender = names[0] if names else bridge.name
            for port in ports:
                place = self.places.get(port.name, NetworkPlace("device", port.name))
                if port.kind != "vxlan" and (port.flood or place.kind == "device"):
                    why = "is flooded" if place.kind == "port" else "is on the bridge"
                    other = next((name for name in names if name != place.name), sender)
                    yield Overheard(other, place.name, _NO_ONE, f"{_what(place)} {why}")
            yield from self._misdirected(bridge, macs, sender)

    def _misdirected(self, bridge: Link, macs: Mapping[str, str], sender: str) -> Iterator[Overheard]:
        """Yield devices that get the frames for the MAC address of another port."""
        owners: dict[str, str] = {}
        for device, mac in macs.items():
            link = self.stack.by_name.get(device)
            if link and link.master == bridge.index:
                owners[mac] = device
        for mac, devices in self.stack.forwarding.get(bridge.index, {}).items():
            for index in devices:
                link = self.stack.links[index]
                if link.kind != "vxlan" and macs.get(link.name) != mac:
                    place = self.places.get(link.name, NetworkPlace("device", link.name))
                    whose = self.places[owners[mac]].name if mac in owners else "nobody"
                    yield Overheard(sender, place.name, mac, f"{_what(place)} gets the frames of {whose}")


def _what(place: NetworkPlace) -> str:
    return place.name if place.kind == "port" else f"device {place.name}"
