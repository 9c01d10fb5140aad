"""Checks of routers' static routes, and the choice among them. Pure functions.

A destination may be any unicast range, also the default route. It can't be a part of a network that the router joins:
instances there are reached without a router. The next hop is an address of an instance in one of these networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from insula.model.errors import Conflict, Invalid
from insula.model.objects import Network
from insula.model.routers import StaticRoute
from insula.model.units import shorten
from insula.network.addresses import RESERVED, Subnet

_RESERVED = [(ip_network(range_), reason) for range_, reason in RESERVED.items()]
_HINT = "write addresses in CIDR notation, as in 172.16.0.0/12 or fd20::/32"


def parse_destination(text: str, *, reserved: Iterable[str] = ()) -> Subnet:
    """Parse the destination of a route. Invalid if it is malformed, has host bits, or lies in a range that is not
    routed. `reserved` are further ranges: those of the uplinks."""
    try:
        if not isinstance(text, str) or "%" in text:
            raise ValueError
        parsed = ip_network(text, strict=False)
    except ValueError:
        raise Invalid(f"destination {shorten(text)} is not a range of addresses", _HINT) from None
    if ip_address(text.partition("/")[0]) != parsed.network_address:
        raise Invalid(f"destination {text} has host bits set", f"the range is {parsed}")
    for other, reason in (*_RESERVED, *((ip_network(each), "is used for this host's uplinks") for each in reserved)):
        if parsed.prefixlen and is_within(parsed, other):
            raise Invalid(f"destination {parsed} can't be routed: {other} {reason}", "use another range")
    return parsed


def parse_route(route: StaticRoute, *, reserved: Iterable[str] = ()) -> StaticRoute:
    """Return the route in canonical form. Invalid."""
    destination = parse_destination(route.destination, reserved=reserved)
    try:
        hop = ip_address(route.next_hop)
        if "%" in route.next_hop:
            raise ValueError
    except ValueError:
        raise Invalid(
            f"next hop {shorten(route.next_hop)} is not an IP address", "use the address of an instance"
        ) from None
    if hop.version != destination.version:
        raise Invalid(f"next hop {hop} can't lead to {destination}", f"use an IPv{destination.version} address")
    return StaticRoute(destination=str(destination), next_hop=str(hop))


def check_routes(router: str, networks: Sequence[Network], routes: Iterable[StaticRoute]) -> None:
    """Check the canonical routes of a router that joins `networks`. Invalid, Conflict."""
    known = set()
    for route in routes:
        if route.destination in known:
            raise Conflict(f"router {router} has two routes to {route.destination}", "a destination has one next hop")
        known.add(route.destination)
        destination = ip_network(route.destination)
        for network in networks:
            for subnet in subnets(network):
                if is_within(destination, subnet):
                    raise Conflict(
                        f"destination {destination} lies in network {network.name}, which router {router} joins",
                        "route to addresses outside of its networks",
                    )
        _check_next_hop(router, networks, route)


def _check_next_hop(router: str, networks: Sequence[Network], route: StaticRoute) -> None:
    hop = ip_address(route.next_hop)
    for network in networks:
        for subnet in subnets(network):
            if hop in subnet:
                if route.next_hop in (network.gateway, network.gateway6):
                    raise Invalid(f"next hop {hop} is the gateway itself", "use the address of an instance")
                if hop == subnet.network_address or (hop.version == 4 and hop == subnet.broadcast_address):
                    raise Invalid(f"next hop {hop} names the whole subnet {subnet}", "use the address of an instance")
                return
    raise Conflict(
        f"next hop {hop} of {route.destination} is in no network that router {router} joins",
        "use the address of an instance there",
    )


def subnets(network: Network) -> list[Subnet]:
    """Return the network's subnets."""
    return [ip_network(each) for each in (network.subnet, network.subnet6) if each]


def is_within(inner: Subnet, outer: Subnet) -> bool:
    """Whether all addresses of one range are in the other."""
    if isinstance(inner, IPv4Network):
        return isinstance(outer, IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, IPv6Network) and inner.subnet_of(outer)
