"""The overlay: a tenant's networks on several hosts, by VXLAN (RFC 7348).

A network with ports on other hosts has a VXLAN device on its bridge, in the tenant's namespace. The device's UDP socket
is in the host's namespace: a VXLAN device keeps the namespace that it was made from. Nothing is learned or flooded. A
port on another host has a forwarding entry of the bridge (MAC address to device), one of the device (MAC address to
host), and a neighbour entry for each of its addresses. From these entries the bridge itself answers the ARP and NDP
requests of local instances (neigh_suppress, bridge(8)), so no request crosses the underlay. Broadcast and multicast
frames stay on their host.

Each host routes between networks that a router joins: a packet is routed on its sender's host, has the gateway's MAC
address there, as everywhere, and arrives on the other network's device.

Frames from the device pass the same filter as those of a port: they may only have the source addresses of ports on
other hosts (rules.py), and from the gateway's MAC address those of networks that are joined.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from insula.kernel import netlink
from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netlink.messages import Link, VxlanSettings
from insula.kernel.netns import call_in
from insula.model.errors import Invalid, Unavailable
from insula.model.objects import Network, Port
from insula.network.addresses import link_local
from insula.network.intent import RemotePort, TenantIntent
from insula.network.linux import namespaces, naming
from insula.network.linux.state import InstalledState
from insula.network.linux.underlay import Members, Underlay


@dataclass(frozen=True)
class Beyond:
    """What is on other hosts: the ports of a network, and the addresses in other networks that reach it by a router."""

    ports: list[RemotePort] = field(default_factory=list)
    routed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.ports or self.routed)


def by_network(intent: TenantIntent, plugged: Iterable[Port]) -> dict[str, Beyond]:
    """Return what is on other hosts by network, without the ports that are plugged here: an instance has moved."""
    here = {(port.network, port.mac) for port in plugged}
    found = {network.name: Beyond() for network in intent.networks}
    joined = {name: set(router.networks) - {name} for router in intent.routers for name in router.networks}
    for remote in intent.remotes:
        if remote.network in found and (remote.network, remote.mac) not in here:
            found[remote.network].ports.append(remote)
            for name in joined.get(remote.network, set()) & found.keys():
                found[name].routed.extend(remote.addresses)
    return found


def addresses(remote: RemotePort) -> list[str]:
    """Return the addresses of a port on another host, the link-local one included if it has IPv6."""
    six = any(":" in address for address in remote.addresses)
    return [*remote.addresses, *([link_local(remote.mac)] if six else [])]


def apply(
    rtnl: Rtnl,
    netns: int,
    members: Members | None,
    network: Network,
    remotes: Sequence[RemotePort],
    now: InstalledState,
    *,
    complete: bool,
) -> None:
    """Make or repair the device of a network that has ports on other hosts, and its entries.

    `rtnl` is in the tenant's namespace `netns`. If `remotes` are `complete` other entries are removed. Unavailable,
    Invalid: what can be made is made.
    """
    if members is None:
        what = f"network {network.name} has instances on other hosts, and this host has no underlay address"
        raise Unavailable(what, "set its underlay address, and start insulad again")
    link = now.links.get(naming.vxlan(network.index))
    if link and not _is_right(link, network, members.underlay, now):
        delete(rtnl, network, now)
        link = None
    if link is None:
        _make(rtnl, netns, members, network)
    known = [remote for remote in remotes if remote.host in members.addresses]
    rtnl.execute(*_requests(now, network, known), *(_stale(now, network, known) if complete else ()))
    members.check(network)
    for remote in remotes:
        if remote not in known:
            what = f"instance {remote.instance} is on host {remote.host}, which is not of this cloud"
            raise Invalid(what, "tell the fabric all hosts first")


def delete(rtnl: Rtnl, network: Network, now: InstalledState) -> None:
    """Delete the device of a network, if there is one, with its entries."""
    if link := now.links.pop(naming.vxlan(network.index), None):
        rtnl.execute(netlink.delete_link(index=link.index))
        for entry in [entry for entry in now.hosts if entry[0] == link.index]:
            del now.hosts[entry]
        now.forwarding.difference_update([entry for entry in now.forwarding if entry[0] == link.index])


def remove(path: Path) -> None:
    """Delete a tenant's VXLAN devices and peerings now: its namespace, mounted at `path`, ends some time later,
    and its VNIs are taken until then."""
    netns = namespaces.open_named(path)
    if netns is not None:
        try:
            call_in(netns, _remove)
        finally:
            os.close(netns)


def _remove() -> None:
    """Delete all devices of the calling thread's namespace that lead to other hosts or other tenants."""
    with Rtnl() as rtnl:
        heads = ("vx", naming.PEERING, naming.PEERING_VXLAN)
        mine = [
            link.index for link in rtnl.links() if any(naming.number(link.name, each) is not None for each in heads)
        ]
        rtnl.execute(*(netlink.delete_link(index=index) for index in mine))


def is_outside(link: Link, links: Mapping[str, Link]) -> bool:
    """Whether the socket of a VXLAN device is in the host's namespace: there is the other end of the uplink, too."""
    uplink = links.get(naming.UPLINK)
    return uplink is None or (link.namespace is not None and link.namespace == uplink.namespace)


def is_closed(link: Link) -> bool:
    """Whether a VXLAN device learns and floods nothing, and the bridge answers for the neighbours behind it."""
    return not (link.learning or link.flood or link.broadcast or link.multicast) and bool(link.suppress)


def _is_right(link: Link, network: Network, underlay: Underlay, now: InstalledState) -> bool:
    settings = VxlanSettings(vni=network.vni, local=underlay.address, port=underlay.port, learning=False)
    return (link.index, link.vxlan) == (naming.vxlan_index(network.index), settings) and is_outside(link, now.links)


def _make(rtnl: Rtnl, netns: int, members: Members, network: Network) -> None:
    """Make the device from the host's namespace."""
    make = netlink.vxlan(
        naming.vxlan(network.index),
        vni=network.vni,
        local=members.underlay.address,
        port=members.underlay.port,
        index=naming.vxlan_index(network.index),
        mtu=network.mtu,
        master=naming.bridge_index(network.index),
        netns=netns,
    )
    members.rtnl.execute(make)
    rtnl.execute(*_port(network))
    rtnl.sync_carrier(naming.vxlan(network.index))


def _port(network: Network) -> list[Request]:
    """Return requests for the settings of the device and of the bridge's port."""
    index, on = naming.vxlan_index(network.index), naming.bridge_index(network.index)
    flags = netlink.set_bridge_port(index, learning=False, flood=False, broadcast=False, multicast=False, suppress=True)
    return [netlink.set_link(index, up=True, mtu=network.mtu, master=on, alias=network.name), flags]


def _requests(now: InstalledState, network: Network, remotes: Sequence[RemotePort]) -> Iterator[Request]:
    """Yield requests for what is missing or wrong at a network's device, which is new if it is not in `now`."""
    index, on = naming.vxlan_index(network.index), naming.bridge_index(network.index)
    link = now.links.get(naming.vxlan(network.index))
    wanted_port = (True, network.mtu, on, network.name)
    if link and not (is_closed(link) and (link.up, link.mtu, link.master, link.alias) == wanted_port):
        yield from _port(network)
    for remote in remotes:
        if now.hosts.get((index, remote.mac)) != remote.host:
            yield netlink.add_forwarding(index, remote.mac, remote=remote.host)
        if (index, remote.mac) not in now.forwarding:
            yield netlink.add_forwarding(index, remote.mac)
        for address in addresses(remote):
            if now.neighbours.get((on, address)) != remote.mac and (network.gateway6 or ":" not in address):
                yield netlink.add_neighbour(on, address, remote.mac)


def _stale(now: InstalledState, network: Network, remotes: Sequence[RemotePort]) -> Iterator[Request]:
    """Yield requests that delete the entries of all other MAC addresses."""
    index, wanted = naming.vxlan_index(network.index), {remote.mac for remote in remotes}
    for at, mac in now.hosts:
        if at == index and mac not in wanted:
            yield netlink.delete_forwarding(index, mac, remote=True)
    for at, mac in now.forwarding:
        if at == index and mac not in wanted:
            yield netlink.delete_forwarding(index, mac)
