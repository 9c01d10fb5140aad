"""Peerings: a veth(4) pair between the routers of two tenants, with routes to the networks of the other side.

The devices have no addresses. The next hop of a route is an address with a permanent neighbour entry on each device.
Only the networks of a peering have paths to its device and from there (rules.py). So what is not in it can't be reached
through it: other networks, other peers, gateways, and the way out of either tenant. The ports that the peer may open
connections to are elements of two sets. Whichever tenant's state is applied makes both ends, so no order is needed.
Instances of the peer on other hosts are reached by `peer_overlay`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from insula.kernel import netlink
from insula.kernel.netlink import NetlinkError, Rtnl
from insula.kernel.netlink.conntrack import ConntrackSocket, Match, to
from insula.kernel.netlink.messages import RT_TABLE_MAIN, Link, Route
from insula.kernel.netns import call_in
from insula.model.errors import Unavailable
from insula.model.objects import Network
from insula.model.policies import PortMatch
from insula.network.addresses import peering_mac
from insula.network.intent import PeeringIntent
from insula.network.linux import naming, sysctl
from insula.network.linux.peerings import transit
from insula.network.routes import is_within, subnets

HOP4: Final = "169.254.127.1"  # of all peerings: link-local addresses belong to one device
HOP6: Final = "fe80::1"
PROTOCOL: Final = 155
"""The origin of these routes in the kernel (rtnetlink(7), rtm_protocol)."""
MTU: Final = 65535  # the networks' own limit packets
_TRIES: Final = 5


@dataclass(frozen=True)
class PeeringEnd:
    """One tenant's end of a peering: its namespace, a socket there, its networks in the peering, and those beyond.

    `transit` are the subnets of the peering's transit addresses, if it has service endpoints (transit.py).
    """

    netns: int
    rtnl: Rtnl
    networks: Sequence[Network]
    others: Sequence[Network]
    transit: Sequence[str] = ()


def ensure(index: int, here: PeeringEnd, there: PeeringEnd, *, first: bool) -> None:
    """Make or repair both ends of a peering. `first` tells the ends apart: it is true for one of them. OSError."""
    name = naming.peering(index)
    for _ in range(_TRIES):
        ours, theirs = here.rtnl.link(name), there.rtnl.link(name)
        if ours and theirs and ours.peer == theirs.index and theirs.peer == ours.index:
            break
        here.rtnl.execute(netlink.delete_link(name=name))
        there.rtnl.execute(netlink.delete_link(name=name))
        try:
            here.rtnl.execute(netlink.veth(name, name, there.netns, mtu=MTU))
        except NetlinkError as error:
            if error.errno != errno.EEXIST:  # the other tenant's state is applied at the same time
                raise
    else:
        raise Unavailable("the other tenant's end changes all the time", "insulad tries again")
    macs = peering_mac(index, first=first), peering_mac(index, first=not first)
    _configure(name, ours, here, *macs)
    _configure(name, theirs, there, *reversed(macs))
    for end in (here, there):
        end.rtnl.sync_carrier(name)


def _configure(name: str, link: Link, end: PeeringEnd, mac: str, other: str) -> None:
    six = _has_ipv6(end) or any(":" in subnet for subnet in end.transit)
    settings = {"disable_ipv6": "0" if six else "1", "accept_ra": "0"}
    call_in(end.netns, lambda: sysctl.write({f"ipv6/conf/{name}/{key}": value for key, value in settings.items()}))
    if (link.up, link.mac, link.mtu) != (True, mac, MTU):
        link_local = False if os.path.exists("/proc/sys/net/ipv6") else None
        end.rtnl.execute(netlink.set_link(link.index, up=True, mac=mac, mtu=MTU, link_local=link_local))
    hops = (HOP4, HOP6) if six else (HOP4,)
    end.rtnl.execute(*(netlink.add_neighbour(link.index, hop, other) for hop in hops))
    wanted = set(_routes(link.index, end))
    present = {route for route in end.rtnl.routes() if route.link == link.index and route.gateway in (HOP4, HOP6)}
    destinations = {route.destination for route in wanted}
    end.rtnl.execute(
        *(netlink.add_route_in(route, protocol=PROTOCOL) for route in wanted - present),
        *(netlink.delete_route_in(route) for route in present - wanted if route.destination not in destinations),
    )
    if new := destinations - {route.destination for route in present}:
        call_in(end.netns, lambda: forget_translated(new))


def forget_translated(destinations: Iterable[str]) -> None:
    """Delete tracked connections to these networks that began when they were outside: their source is translated to the
    uplink's address as long as they last. Runs in the tenant's namespace."""
    networks = [ip_network(each) for each in destinations]
    with ConntrackSocket() as conntrack:
        found = [each for version in (4, 6) for each in conntrack.connections(Match(version=version))]
        translated = {each.original.destination for each in found if each.reply.destination != each.original.source}
        inside = {each for each in translated if any(is_within(ip_network(each), network) for network in networks)}
        conntrack.delete(to(each) for each in inside)


def _routes(index: int, end: PeeringEnd) -> Iterator[Route]:
    """Yield the routes of one end."""
    source, source6 = sources(end.rtnl, end.networks)
    for subnet in map(ip_network, end.transit):
        if subnet.version == 4:
            yield Route(RT_TABLE_MAIN, str(subnet), HOP4, index, source)
        else:
            yield Route(RT_TABLE_MAIN, str(subnet), HOP6, index, source6)
    for network in end.others:
        for subnet in subnets(network):
            if subnet.version == 4:
                yield Route(RT_TABLE_MAIN, str(subnet), HOP4, index, source)
            elif _has_ipv6(end):
                yield Route(RT_TABLE_MAIN, str(subnet), HOP6, index, source6)


def sources(rtnl: Rtnl, networks: Iterable[Network]) -> tuple[str | None, str | None]:
    """Return the IPv4 and IPv6 address that what the router itself sends to the peer has: a gateway's."""
    present = {address.address.partition("/")[0] for address in rtnl.addresses()}
    own = [each for network in networks for each in (network.gateway, network.gateway6) if each in present]
    four = next((address for address in own if ":" not in address), None)
    return four, next((address for address in own if ":" in address), None)


def _has_ipv6(end: PeeringEnd) -> bool:
    return any(network.gateway6 for network in end.networks)


def elements(
    networks: Mapping[str, Network], peerings: Sequence[PeeringIntent], between: Collection[int] = ()
) -> dict[str, list[tuple[str, ...]]]:
    """Return the set elements of a tenant's peerings. `networks` are the tenant's that are installed, by name, and
    `between` the indices of peerings that lead to other hosts as well (peer_overlay.py)."""
    paths: set[tuple[str, ...]] = set()
    protocols: set[tuple[str, ...]] = set()
    ports: set[tuple[str, ...]] = set()
    devices = [(peering, naming.peering(peering.index)) for peering in peerings]
    devices += [(each, naming.peering_vxlan(each.index)) for each in peerings if each.index in between]
    for peering, device in devices:
        for network in (networks[name] for name in peering.networks if name in networks):
            bridge = naming.bridge(network.index)
            paths |= {*([(bridge, device)] if peering.routed else []), *([(device, bridge)] if peering.allow else [])}
        for match in peering.allow:
            if match.port is None:
                protocols |= {(device, protocol) for protocol in _protocols(match)}
            else:
                numbers = range(match.port, (match.end_port or match.port) + 1)
                ports |= {(device, match.protocol, str(number)) for number in numbers}
        paths.update(transit.paths(networks, peering))
    return {
        **transit.pinged(networks, peerings),
        "inet paths": sorted(paths),
        "inet peer_protocols": sorted(protocols),
        "inet peer_ports": sorted(ports),
    }


def _protocols(match: PortMatch) -> Sequence[str]:
    return ("icmp", "icmpv6") if match.protocol == "icmp" else (match.protocol,)
