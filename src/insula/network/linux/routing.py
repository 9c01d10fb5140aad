"""Routing between a tenant's networks: static routes of its routers, and the paths that a router opens.

The kernel routes between all bridges of a namespace; which of them are joined is told by set elements (rules.py). A
router has a number, that of the bridge of its first network. The map `routers` has the number for each of its networks,
and the set `joined` the networks for each number, so there are as many elements as networks and not as pairs of them. A
router without static routes needs nothing else.

The static routes of a router act for packets from its own networks only. So these look up (ip-rule(8), `iif`) a routing
table with all networks of the router and its static routes, of which the longest destination decides. What is not there
is looked up in the main table, which has all networks and the way out.

Answers from outside, and errors that the router itself sends (RFC 792, RFC 4443), come from no network. They use what
the main table has about networks, and then the table `COMMON`, which has the static routes to addresses that no other
router of the tenant routes elsewhere.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final, NamedTuple

from insula.kernel import netlink
from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netlink.messages import RT_TABLE_MAIN, Route, Rule
from insula.model.objects import Network
from insula.model.routers import Router, StaticRoute
from insula.network.linux import naming, rules
from insula.network.routes import is_within, subnets

PROTOCOL: Final = 154
"""The origin of our routes and rules in the kernel (rtnetlink(7), rtm_protocol)."""
COMMON: Final = 999_999_999
"""The number of a routing table. That of a router has the router's number."""
_OF_NETWORK, _CONNECTED, _OF_TENANT = 1000, 1001, 1002  # priorities of rules
ROUTERS: Final = "inet routers"
SETS: Final = (ROUTERS, "inet joined", "inet routed4", "inet routed6")
"""The sets that have the elements of routers, and no others (rules.py)."""
_TOGETHER: Final = 100  # requests in one message to the kernel
_ANYWHERE: Final = ("0.0.0.0/0", "::/0")


@dataclass(frozen=True)
class Routing:
    """Routes and rules, wanted or installed."""

    routes: frozenset[Route] = frozenset()
    rules: frozenset[Rule] = frozenset()


def wanted(networks: Mapping[str, Network], routers: Iterable[Router]) -> Routing:
    """Return the routes and rules for these routers. `networks` are the tenant's that are installed, by name."""
    active = [router for router in routers if router.routes]
    routes, lookups = set[Route](), set[Rule]()
    for router in active:
        joined = [networks[name] for name in router.networks if name in networks]
        if not joined:
            continue
        static = [(route, network) for route in router.routes for network in joined if _is_on(route, network)]
        table = _number(joined)
        here = _connected(joined, table) | {_static(table, route, on) for route, on in static}
        for family in _families(here):
            lookups |= {Rule(family, naming.bridge(network.index), table, _OF_NETWORK) for network in joined}
        routes |= here
        routes |= {
            _static(COMMON, route, on)
            for route, on in static
            if route.destination not in _ANYWHERE and not _is_ambiguous(route, router, active)
        }
    for family in _families(route for route in routes if route.table == COMMON):
        for device in (naming.UPLINK, "lo"):
            lookups |= {
                Rule(family, device, RT_TABLE_MAIN, _CONNECTED, short=0),
                Rule(family, device, COMMON, _OF_TENANT),
            }
    return Routing(frozenset(routes), frozenset(lookups))


def _number(joined: Iterable[Network]) -> int:
    """Return the number of the router that joins these networks."""
    return naming.bridge_index(min(network.index for network in joined))


def _families(routes: Iterable[Route]) -> set[int]:
    return {socket.AF_INET6 if ":" in route.destination else socket.AF_INET for route in routes}


def _connected(networks: Iterable[Network], table: int) -> set[Route]:
    return {
        Route(table, str(subnet), None, naming.bridge_index(network.index))
        for network in networks
        for subnet in subnets(network)
    }


def _static(table: int, route: StaticRoute, network: Network) -> Route:
    return Route(table, route.destination, route.next_hop, naming.bridge_index(network.index))


def _is_on(route: StaticRoute, network: Network) -> bool:
    hop = ip_network(route.next_hop)
    return any(is_within(hop, subnet) for subnet in subnets(network))


def _is_ambiguous(route: StaticRoute, router: Router, routers: Sequence[Router]) -> bool:
    """Whether another router has a route to some of the same addresses."""
    destination = ip_network(route.destination)
    others = (ip_network(each.destination) for other in routers if other.name != router.name for each in other.routes)
    return any(
        is_within(destination, other) or is_within(other, destination)
        for other in others
        if str(other) not in _ANYWHERE
    )


def read(rtnl: Rtnl) -> Routing:
    """Read ours from the kernel: the routes of our tables, and the rules that name them."""
    routes = (route for route in rtnl.routes() if _is_ours(route.table))
    lookups = (rule for rule in rtnl.rules() if _is_ours(rule.table) or rule.priority == _CONNECTED)
    return Routing(frozenset(routes), frozenset(lookups))


def _is_ours(table: int) -> bool:
    return table == COMMON or naming.is_bridge_index(table)


class RoutingChanges(NamedTuple):
    """Requests to carry out before the set elements are changed, and after that."""

    before: Sequence[Request]
    after: Sequence[Request]


def changes(now: Routing, want: Routing) -> RoutingChanges:
    """Return the requests that change one into the other. Routes come before the rules that lead to them."""
    return RoutingChanges(
        [
            *(netlink.add_route_in(each, protocol=PROTOCOL) for each in sorted(want.routes - now.routes, key=_order)),
            *(netlink.add_rule(each, protocol=PROTOCOL) for each in sorted(want.rules - now.rules)),
        ],
        [
            *(netlink.delete_rule(rule) for rule in now.rules - want.rules),
            *(netlink.delete_route_in(route) for route in now.routes - want.routes),
        ],
    )


def execute(rtnl: Rtnl, requests: Sequence[Request]) -> None:
    """Send requests in parts whose answers fit into the socket's buffer. NetlinkError."""
    for start in range(0, len(requests), _TOGETHER):
        rtnl.execute(*requests[start : start + _TOGETHER])


def missing(
    rtnl: Rtnl, present: Mapping[str, set[tuple[str, ...]]], networks: Mapping[str, Network], router: Router
) -> list[str]:
    """Return what the kernel lacks of a router, as text. `present` are the elements of all sets, `networks` all of the
    tenant's by name."""
    links = {link.index for link in rtnl.links()}
    found = [f"network {name} is missing" for name in router.networks if name not in networks]
    here = [networks[name] for name in router.networks if name in networks]
    found += [f"network {n.name} is not there" for n in here if naming.bridge_index(n.index) not in links]
    if any(not present.get(name, set()) >= set(some) for name, some in elements(networks, [router]).items()):
        found.append("a path between its networks is missing")
    if router.routes:
        now, want = read(rtnl), wanted(networks, [router])
        routes = {route for route in want.routes - now.routes if route.table != COMMON}
        found += [f"route to {route.destination} is missing" for route in sorted(routes, key=_order)]
        found += [
            f"rule for {rule.device} is missing" for rule in sorted(want.rules - now.rules) if rule.table != COMMON
        ]
    return found


def _order(route: Route) -> tuple[bool, str, int]:
    """Routes to networks come first: next hops are in them."""
    return route.gateway is not None, route.destination, route.table


# -- elements ------------------------------------------------------------------------------------------------------


def elements(networks: Mapping[str, Network], routers: Iterable[Router]) -> dict[str, list[tuple[str, ...]]]:
    """Return the set elements of these routers: the networks of each, and their gateways, which answer pings from
    there."""
    members, four, six = list[tuple[str, ...]](), list[tuple[str, ...]](), list[tuple[str, ...]]()
    for router in routers:
        if joined := [networks[name] for name in router.networks if name in networks]:
            number = str(_number(joined))
            members += [(naming.bridge(network.index), number) for network in joined]
            four += [(network.gateway, number) for network in joined]
            six += [(network.gateway6, number) for network in joined if network.gateway6]
    return dict(zip(SETS, (members, members, four, six), strict=True))


def known(have: Mapping[str, set[bytes]], wanted: rules.Elements) -> dict[str, set[bytes]]:
    """Return the keys of the sets of routers that are among the elements `wanted`: a record that can't be read may have
    the others."""
    return {name: have[name] & {rules.key(name, each) for each in wanted.get(name, ())} for name in SETS}
