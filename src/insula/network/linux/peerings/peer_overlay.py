"""Peerings between hosts: what instances exchange with those of a peer on other hosts, by VXLAN (RFC 7348).

A packet is routed in the sender's namespace on its host, sent to the host of its destination, and routed there in the
receiver's namespace (symmetric IRB, RFC 9135). So it passes one namespace of each tenant, the answer passes the same
ones, and each has the whole connection in its connection tracking: the rules are those of a peering on one host. No
tenant needs a namespace, or a network, on a host where it has no instances.

An end of a peering on a host is a VXLAN device with the tenant's VNI of this peering. It has a MAC address that follows
from the host's underlay address. Each address of the peer on another host has a route to the device, and a neighbour
entry with the MAC address of that host, whose forwarding entry tells the host and the peer's VNI. Nothing is learned or
flooded. Connections may only come from these addresses (set `visitors4` and `visitors6`, rules.py).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Network, ip_network
from typing import Final

from insula.kernel import netlink
from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netlink.messages import RT_TABLE_MAIN, Link, Route, VxlanSettings
from insula.kernel.netns import call_in
from insula.model.errors import Conflict, Invalid, Unavailable
from insula.model.objects import Network, Port
from insula.network.addresses import host_mac, peering_mac
from insula.network.intent import PeeringIntent
from insula.network.linux import naming, overlay, sysctl
from insula.network.linux.peerings import peering, transit
from insula.network.linux.underlay import Members
from insula.network.routes import is_within, subnets

_MOST_MTU: Final = 65535


@dataclass(frozen=True)
class PeerHosts:
    """A tenant's end of a peering with other hosts: the namespace, a socket there, and its networks in the peering.

    `hosts` are the underlay addresses by the peer's addresses. `whole` are ranges of the peer of which nothing else is
    reached: they are routed to the device if the peer has no namespace here.
    """

    joined: PeeringIntent
    netns: int
    rtnl: Rtnl
    networks: Sequence[Network]
    hosts: Mapping[str, str]
    whole: Sequence[str] = ()


def is_needed(joined: PeeringIntent, ports: Iterable[Port]) -> bool:
    """Whether instances of this host have somebody to reach on other hosts by the peering."""
    networks = {*joined.networks, *(each.network for each in joined.consumes)}
    beyond = joined.remotes or joined.clients or any(each.host for each in joined.consumes)
    return bool(beyond) and any(port.network in networks for port in ports)


def hosts_of(joined: PeeringIntent, range6: IPv6Network) -> dict[str, str]:
    """Return the underlay addresses of the peer's hosts by the addresses that are reached there. Invalid if one is in
    none of the peer's networks."""
    ranges = [subnet for network in joined.others for subnet in subnets(network)] if joined.routed else []
    found = {address: remote.host for remote in joined.remotes for address in remote.addresses}
    for address in found:
        if not any(is_within(ip_network(address), range_) for range_ in ranges):
            what = f"{address} is in no network of {joined.peer.name} that is in peering {joined.name}"
            raise Invalid(what, "give ports of the peer's networks in it")
    return found | transit.hosts(joined, range6)


def elements(
    networks: Mapping[str, Network], joined: PeeringIntent, range6: IPv6Network
) -> dict[str, list[tuple[str, ...]]]:
    """Return the set elements by which the peer's instances on other hosts may open connections. `networks` are the
    tenant's that are installed, by name."""
    device = naming.peering_vxlan(joined.index)
    own = [address for remote in joined.remotes for address in remote.addresses] if joined.routed else []
    known = [*own, *transit.clients(joined, range6)] if any(name in networks for name in joined.networks) else []
    return {
        "inet visitors4": [(device, address) for address in known if ":" not in address],
        "inet visitors6": [(device, address) for address in known if ":" in address],
    }


def apply(end: PeerHosts, members: Members | None, *, complete: bool) -> None:
    """Make or repair the device, and its routes and entries; if `complete` others are removed. Unavailable, Invalid,
    Conflict, OSError: what can be made is made."""
    joined = end.joined
    if members is None:
        what = f"peering {joined.name} has instances on other hosts, and this host has no underlay address"
        raise Unavailable(what, "set its underlay address, and start insulad again")
    if joined.vni is None or joined.peer_vni is None:
        raise Invalid(f"peering {joined.name} has instances on other hosts, and no VNIs", "give it one for each side")
    known = {address: host for address, host in end.hosts.items() if host in members.addresses}
    macs = {host_mac(host): host for host in known.values()}
    _ensure_device(end, members, joined.vni)
    end.rtnl.execute(*_entries(end, known, macs, joined.peer_vni, complete=complete))
    _ensure_routes(end, known, complete=complete)
    end.rtnl.sync_carrier(naming.peering_vxlan(joined.index))
    for host in {*end.hosts.values()}:
        if host not in members.addresses:
            what = f"{joined.peer.name} has instances on host {host}, which is not of this cloud"
            raise Invalid(what, "tell the fabric all hosts first")
        if macs[host_mac(host)] != host:
            what = f"hosts {host} and {macs[host_mac(host)]} have the same MAC address for peerings"
            raise Conflict(what, "give one of them another underlay address")


def delete(rtnl: Rtnl, index: int) -> None:
    """Delete the device of a peering, if there is one, with all that leads to it."""
    rtnl.execute(netlink.delete_link(name=naming.peering_vxlan(index)))


def _ensure_device(end: PeerHosts, members: Members, vni: int) -> None:
    underlay, links = members.underlay, {link.name: link for link in end.rtnl.links()}
    name, index = naming.peering_vxlan(end.joined.index), naming.peering_vxlan_index(end.joined.index)
    mtu, mac = min(members.room()[1], _MOST_MTU), host_mac(underlay.address)
    settings = VxlanSettings(vni=vni, local=underlay.address, port=underlay.port, learning=False)
    link = links.get(name)
    if link and not ((link.index, link.vxlan) == (index, settings) and overlay.is_outside(link, links)):
        delete(end.rtnl, end.joined.index)
        link = None
    if link is None:
        made = netlink.vxlan(
            name, vni=vni, local=underlay.address, port=underlay.port, index=index, mtu=mtu, mac=mac, netns=end.netns
        )
        members.rtnl.execute(made)
    if link is None or (link.up, link.mac, link.mtu) != (True, mac, mtu):
        link_local = False if os.path.exists("/proc/sys/net/ipv6") else None
        end.rtnl.execute(netlink.set_link(index, up=True, mac=mac, mtu=mtu, link_local=link_local))
    six = any(network.gateway6 for network in end.networks) or any(":" in each for each in end.hosts)
    conf = {f"ipv6/conf/{name}/disable_ipv6": "0" if six else "1", f"ipv6/conf/{name}/accept_ra": "0"}
    call_in(end.netns, lambda: sysctl.write(conf))


def _entries(
    end: PeerHosts, known: Mapping[str, str], macs: Mapping[str, str], vni: int, *, complete: bool
) -> Iterator[Request]:
    """Yield requests for neighbour and forwarding entries. That of the next hop of whole ranges has no host."""
    index = naming.peering_vxlan_index(end.joined.index)
    nowhere = peering_mac(end.joined.index, first=True)
    hops = {peering.HOP6 if ":" in range_ else peering.HOP4: nowhere for range_ in end.whole}
    wanted = {**hops, **{address: host_mac(host) for address, host in known.items()}}
    have = _neighbours(end.rtnl, index)
    yield from (netlink.add_neighbour(index, a, mac) for a, mac in wanted.items() if have.get(a) != mac)
    sent = _forwarding(end.rtnl, index)
    yield from (
        netlink.add_forwarding(index, mac, remote=host, vni=vni)
        for mac, host in macs.items()
        if sent.get(mac) != (host, vni)
    )
    if complete:
        yield from (netlink.delete_neighbour(index, address) for address in have.keys() - wanted.keys())
        yield from (netlink.delete_forwarding(index, mac, remote=True) for mac in sent.keys() - macs.keys())


def _ensure_routes(end: PeerHosts, known: Iterable[str], *, complete: bool) -> None:
    index, source = naming.peering_vxlan_index(end.joined.index), peering.sources(end.rtnl, end.networks)
    single = [(_range(address), None) for address in known]
    whole = [(range_, peering.HOP6 if ":" in range_ else peering.HOP4) for range_ in end.whole]
    wanted = {Route(RT_TABLE_MAIN, to, hop, index, source[":" in to]) for to, hop in (*single, *whole)}
    present = {route for route in end.rtnl.routes(peering.PROTOCOL) if route.link == index}
    destinations = {route.destination for route in wanted}
    gone = [route for route in present - wanted if complete and route.destination not in destinations]
    end.rtnl.execute(
        *(netlink.add_route_in(route, protocol=peering.PROTOCOL) for route in sorted(wanted - present)),
        *(netlink.delete_route_in(route) for route in gone),
    )
    if new := destinations - {route.destination for route in present}:
        call_in(end.netns, lambda: peering.forget_translated(new))


def _range(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"


def _neighbours(rtnl: Rtnl, index: int) -> dict[str, str]:
    """Return the MAC addresses of permanent neighbours at a device."""
    families = (socket.AF_INET, socket.AF_INET6)
    entries = [entry for family in families for entry in rtnl.neighbours(family) if entry.index == index]
    return {entry.address: entry.mac for entry in entries if entry.permanent and entry.address}


def _forwarding(rtnl: Rtnl, index: int) -> dict[str, tuple[str, int | None]]:
    """Return the hosts and VNIs of a device's forwarding entries, by MAC address."""
    entries = [entry for entry in rtnl.neighbours(socket.AF_BRIDGE) if entry.index == index]
    return {entry.mac: (entry.host, entry.vni) for entry in entries if entry.permanent and entry.host}


def drift(rtnl: Rtnl, link: Link, links: Mapping[str, Link], known: Iterable[str]) -> Iterator[str]:
    """Check the device of a peering: that it is one, and that packets find the way to the addresses `known`, from which
    the rules accept connections; as text."""
    if link.vxlan is None or link.vxlan.learning or not overlay.is_outside(link, links) or link.master:
        yield f"device {link.name} is not the VXLAN device it should be"
    if not link.up:
        yield f"device {link.name} is down"
    routed = {route.destination for route in rtnl.routes(peering.PROTOCOL) if route.link == link.index}
    neighbours, sent = _neighbours(rtnl, link.index), _forwarding(rtnl, link.index)
    for address in sorted(known):
        if _range(address) not in routed:
            yield f"device {link.name} has no route to {address}"
        if neighbours.get(address) not in sent:
            yield f"device {link.name} has no host for {address}"
