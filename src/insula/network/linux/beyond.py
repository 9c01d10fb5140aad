"""Routes inside instances with several ports: what a network's router or peering leads to is reached by that port.

An instance with one port needs none, since its default route leads to everything. With several the first port has the
default routes (interfaces.py), and the gateway of another port's network is asked only for what is beyond that: the
other networks of its router, static routes, and networks of peers. The longest destination decides; if two ports lead
to the same one, the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from insula.kernel.netlink import Rtnl, add_route_in, delete_route_in
from insula.kernel.netlink.messages import RT_TABLE_MAIN, Route
from insula.kernel.netns import call_in
from insula.model.objects import Network
from insula.model.routers import Router
from insula.network.fabric import Places
from insula.network.intent import PeeringIntent, TenantIntent
from insula.network.linux.interfaces import addresses_of, number
from insula.network.linux.reporting import reported
from insula.network.routes import subnets

PROTOCOL: Final = 156
"""The origin of these routes in the kernel (rtnetlink(7), rtm_protocol)."""


@dataclass(frozen=True)
class _Known:
    networks: Mapping[str, Network]
    routers: Sequence[Router]
    peerings: Sequence[PeeringIntent]
    complete: bool


class RoutesBeyond:
    """What is beyond the networks of each tenant, by its last intent."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def know(self, intent: TenantIntent) -> None:
        networks = {network.name: network for network in intent.networks}
        self._known[intent.tenant.name] = _Known(networks, intent.routers, intent.peerings, intent.complete)

    def forget(self, tenant: str) -> None:
        self._known.pop(tenant, None)

    def install(self, tenant: str, netns: int, places: Places) -> None:
        """Change the routes in an instance's namespace to those for its ports; nothing before the tenant's first
        intent. If that is incomplete, none is deleted. Failed."""
        if (known := self._known.get(tenant)) is None or not places:
            return
        with reported(*places[0]), call_in(netns, Rtnl) as inside:
            links = {link.name: link.index for link in inside.links()}
            wanted = set(_routes(known, [each for each in places if each[1].interface in links], links))
            present = set(inside.routes(PROTOCOL))
            stay = {(route.destination, route.link) for route in wanted}
            gone = [each for each in present - wanted if (each.destination, each.link) not in stay and known.complete]
            inside.execute(*(delete_route_in(each) for each in gone))
            inside.execute(*(add_route_in(each, protocol=PROTOCOL) for each in wanted - present))


def _routes(known: _Known, places: Places, links: Mapping[str, int]) -> Iterator[Route]:
    """Yield the routes of an instance with these ports; none if it is only one."""
    taken = {str(subnet) for network, _ in places for subnet in subnets(network)}
    for network, port in sorted(places, key=lambda place: number(place[1])) if len(places) > 1 else ():
        for destination in _beyond(known, network.name):
            for each in addresses_of(network, port):
                if (":" in destination) == (":" in each.gateway) and destination not in taken:
                    taken.add(destination)
                    yield Route(RT_TABLE_MAIN, destination, each.gateway, links[port.interface])


def _beyond(known: _Known, network: str) -> Iterator[str]:
    """Yield what is reached through the gateway of a network, without the default route."""
    for router in known.routers:
        if network in router.networks:
            yield from _subnets(known.networks[name] for name in router.networks if name in known.networks)
            yield from (route.destination for route in router.routes if ip_network(route.destination).prefixlen)
    for peering in known.peerings:
        if peering.routed and network in peering.networks:
            yield from _subnets(peering.others)


def _subnets(networks: Iterable[Network]) -> Iterator[str]:
    return (str(subnet) for network in networks for subnet in subnets(network))
