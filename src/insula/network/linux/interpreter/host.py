"""Interpret the installed state of the host between tenants: whom a tenant's uplink reaches, and who reaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from insula.network.interpreter.alike import representatives
from insula.network.interpreter.boundaries import collect
from insula.network.interpreter.delivery import Delivery, NetworkPlace, PacketSource
from insula.network.interpreter.space import Boundaries, NumberRange, Service, Space
from insula.network.linux.interpreter.forwarding import Forwarding
from insula.network.linux.interpreter.stack import Stack


@dataclass(frozen=True)
class UplinkView:
    """The host's end of a tenant's uplink, and the addresses of the tenant's end by version."""

    tenant: str
    device: str
    addresses: tuple[tuple[int, str], ...]


class HostInterpreter:
    def __init__(self, stack: Stack, uplinks: Sequence[UplinkView], cuts: Mapping[int, Boundaries]) -> None:
        self.stack = stack
        self._uplinks = [each for each in uplinks if each.device in stack.by_name]
        self._cuts = cuts
        self.places = {link.name: NetworkPlace("outside") for link in stack.links.values() if link.name != "lo"}
        self.places |= {each.device: NetworkPlace("tenant", each.tenant) for each in self._uplinks}

    def space(self, version: int) -> tuple[Sequence[NumberRange], Sequence[Service]]:
        """Return the addresses and services that the host's rules and routes tell apart."""
        boundaries = self._cuts[version]
        collect(self.stack.program, boundaries)
        for route in self.stack.routing[version].routes:
            boundaries.addresses.add(*route.range)
        return boundaries.addresses.atoms(), representatives(self.stack.program, boundaries)

    def from_uplinks(self, version: int) -> Delivery:
        """Run packets of every tenant: with the address of its uplink, and with any other."""
        targets, services = self.space(version)
        senders: list[PacketSource] = []
        devices = []
        for each in self._uplinks:
            place, link = NetworkPlace("tenant", each.tenant), self.stack.by_name[each.device]
            own = int(ip_address(dict(each.addresses)[version]))
            senders += [PacketSource(place, NumberRange(own, own)), PacketSource(place, None)]
            devices += [link, link]
        delivery = Delivery(version, senders, Space(len(senders), targets, services))
        Forwarding(self.stack, delivery, self.places).from_devices(devices)
        return self._named(delivery)

    def from_others(self, version: int) -> Delivery:
        """Run packets from anywhere that are not a tenant's; only those that end at a tenant matter."""
        targets, services = self.space(version)
        delivery = Delivery(version, [PacketSource(NetworkPlace("outside"), None)], Space(1, targets, services))
        Forwarding(self.stack, delivery, self.places).from_devices([None])
        return self._named(delivery)

    def _named(self, delivery: Delivery) -> Delivery:
        """Call this stack itself the host."""
        if (here := delivery.ends.pop(NetworkPlace("router"), 0)) != 0:
            delivery.add(NetworkPlace("host"), here)
        return delivery
