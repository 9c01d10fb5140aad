"""The installed state of a tenant's namespace, and the requests that change it to the wanted state.

Reading takes one dump of each table, however large the change. Requests are made for differences only.
"""

from __future__ import annotations

import functools
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

from insula.kernel import netlink
from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netlink.messages import Link
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import call_in
from insula.model.objects import Network, Port
from insula.network.addresses import gateway_mac
from insula.network.linux import naming, pairs, routing, rules, sysctl
from insula.network.linux.deletion import is_gone


@dataclass(frozen=True)
class InstalledState:
    """The installed state of a tenant's namespace."""

    links: dict[str, Link]
    """By name, without those that are marked for deletion."""
    marked_groups: set[int]
    """Groups of links that are marked for deletion."""
    addresses: dict[int, set[str]]
    """With prefix lengths, by the index of the link."""
    neighbours: dict[tuple[int, str], str]
    """Permanent entries on bridges: (index of the link, IP address) to MAC address."""
    forwarding: set[tuple[int, str]]
    """Permanent entries of bridges: (index of the link, MAC address)."""
    hosts: dict[tuple[int, str], str]
    """Entries of VXLAN devices: (index of the link, MAC address) to the address of the host."""
    elements: dict[str, set[bytes]]
    """Keys by set."""
    ipv6: set[str]
    """Names of bridges with IPv6."""
    routing: routing.Routing
    """Static routes of routers."""


def read(netns: int, rtnl: Rtnl, nftables: NftablesSocket, table: str) -> InstalledState:
    """Read the state of the namespace `netns`; the sockets are in it."""
    links, gone = {}, set()
    for link in rtnl.links():
        if is_gone(link.group):
            gone.add(link.group)
        else:
            links[link.name] = link
    addresses: dict[int, set[str]] = defaultdict(set)
    for address in rtnl.addresses():
        if not address.link_local:
            addresses[address.index].add(address.address)
    neighbours = {
        (entry.index, entry.address): entry.mac
        for family in (socket.AF_INET, socket.AF_INET6)
        for entry in rtnl.neighbours(family)
        if entry.permanent and entry.address and naming.is_bridge_index(entry.index)
    }
    entries = [entry for entry in rtnl.neighbours(socket.AF_BRIDGE) if entry.permanent]
    forwarding = {(entry.index, entry.mac) for entry in entries if entry.host is None}
    hosts = {(entry.index, entry.mac): entry.host for entry in entries if entry.host is not None}
    bridges = [name for name in links if naming.number(name, "br") is not None]
    ipv6 = call_in(netns, lambda: {each for each in bridges if _has_ipv6(each)})
    return InstalledState(
        links, gone, addresses, neighbours, forwarding, hosts, keys(nftables, table), ipv6, routing.read(rtnl)
    )


def keys(nftables: NftablesSocket, table: str) -> dict[str, set[bytes]]:
    """Return the keys of all sets, by "family set"."""
    return {name: rules.read(nftables, table, name) for name in rules.SETS}


def _has_ipv6(device: str) -> bool:
    return sysctl.read(f"ipv6/conf/{device}/disable_ipv6") == "0"


# -- differences --------------------------------------------------------------------------------------------------


def uplink(state: InstalledState, wanted: Iterable[str]) -> list[Request]:
    """Return requests that remove addresses which the uplink should not have."""
    link = state.links.get(naming.UPLINK)
    others = state.addresses.get(link.index, set()) - set(wanted) if link else ()
    return [netlink.delete_address(link.index, each) for each in others] if link else []


def bridge(state: InstalledState, network: Network, endpoints: Sequence[str] = ()) -> list[Request]:
    """Return requests for a network's bridge, which exists and has the right index: properties and addresses."""
    index, mac = naming.bridge_index(network.index), gateway_mac(network.index)
    wanted = [*gateways(network), *(f"{each}/{128 if ':' in each else 32}" for each in endpoints)]
    link, present = state.links.get(naming.bridge(network.index)), state.addresses.get(index, set())
    found = []
    if not link or (link.up, link.mac, link.mtu, link.alias) != (True, mac, network.mtu, network.name):
        found.append(netlink.set_link(index, up=True, mac=mac, mtu=network.mtu, alias=network.name))
    found += [netlink.delete_address(index, address) for address in present if address not in wanted]
    found += [netlink.add_address(index, address) for address in wanted if address not in present]
    return found


def port(state: InstalledState, network: Network, port: Port) -> list[Request]:
    """Return requests for the router's side of a port; none if its device is missing."""
    index, on = naming.port_index(port.index), naming.bridge_index(network.index)
    link = state.links.get(naming.port(port.index))
    if link is None or link.index != index:
        return []
    right = (link.up, link.mtu, link.master, link.alias) == (True, network.mtu, on, port.instance)
    right = (
        right
        and (index, port.mac) in state.forwarding
        and link.learning == learns(port)
        and not link.flood
        and link.hairpin is True
    )
    if not right or any(state.neighbours.get((on, address)) != port.mac for address in addresses(port)):
        return [
            netlink.set_link(index, up=True, mtu=network.mtu, master=on, alias=port.instance),
            *port_settings(network, port),
        ]
    return []


def port_settings(network: Network, port: Port) -> list[Request]:
    """Return requests for permanent entries of a port's MAC and IP addresses: nothing can be forged, nor learned except
    for MAC addresses that move between ports (pairs.py)."""
    index, on = naming.port_index(port.index), naming.bridge_index(network.index)
    return [
        netlink.set_bridge_port(index, learning=learns(port), flood=False, hairpin=True, alias=port.instance),
        netlink.add_forwarding(index, port.mac),
        *(netlink.add_neighbour(on, address, port.mac) for address in addresses(port)),
    ]


def learns(port: Port) -> bool:
    """Whether the bridge learns MAC addresses at this port, of those that the rules let through."""
    return bool(pairs.macs(port))


def differences(
    wanted: Iterable[rules.Elements], have: dict[str, set[bytes]]
) -> tuple[dict[str, set[bytes]], dict[str, set[bytes]]]:
    """Return the keys to add to the sets, and those to delete, to get from the keys `have` to the elements `wanted`."""
    keys: dict[str, set[bytes]] = {name: set() for name in have}
    for each in wanted:
        for name, some in each.items():
            keys[name].update(rules.key(name, element) for element in some)
    added = {name: keys[name] - present for name, present in have.items()}
    return added, {name: present - keys[name] for name, present in have.items()}


# -- addresses ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def prefix(subnet: str) -> int:
    """Return the prefix length of a subnet."""
    return ip_network(subnet).prefixlen


def gateways(network: Network) -> list[str]:
    """Return the gateway's addresses with prefix lengths."""
    found = [f"{network.gateway}/{prefix(network.subnet)}"]
    if network.gateway6 and network.subnet6:
        found.append(f"{network.gateway6}/{prefix(network.subnet6)}")
    return found


def addresses(port: Port) -> list[str]:
    """Return the port's IPv4 and IPv6 address."""
    return [port.address, *([port.address6] if port.address6 else [])]
