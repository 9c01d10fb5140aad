"""Interpret the link layer of a tenant's namespace: forwarding entries of VXLAN devices, and neighbours of bridges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address

from insula.kernel.netlink.messages import Link
from insula.network.interpreter.delivery import NetworkPlace
from insula.network.interpreter.links import BridgePort, LinkLayer, TunnelEnd
from insula.network.interpreter.space import BITS
from insula.network.linux.interpreter.stack import Stack


def link_layer(
    stack: Stack, overlays: Mapping[str, str], bridges: Mapping[str, str], places: Mapping[str, NetworkPlace]
) -> LinkLayer:
    """Return what leaves by VXLAN devices, and what is on bridges. `overlays` are networks and peerings, and `bridges`
    networks, by the names of their devices, `places` those of ports and VXLAN devices. Others are in
    `Interpretation.overheard`."""
    tunnels: dict[tuple[str, str], frozenset[TunnelEnd]] = {}
    neighbours: dict[tuple[str, str], str] = {}
    for link in stack.links.values():
        if link.vxlan is None:
            continue
        network = overlays.get(link.name, f"device {link.name}")
        for (index, mac), hosts in stack.tunnels.items():
            if index == link.index:
                ends = (TunnelEnd(host, link.vxlan.vni if vni is None else vni) for host, vni in hosts)
                tunnels[network, mac] = frozenset(ends)
        for (version, index, address), mac in stack.neighbours.items():
            if index == (link.master or link.index):
                neighbours[network, str(ip_address(address.to_bytes(BITS[version] // 8, "big")))] = mac
    return LinkLayer(tunnels, neighbours, dict(_ports(stack, bridges, places)))


def _ports(
    stack: Stack, bridges: Mapping[str, str], places: Mapping[str, NetworkPlace]
) -> Iterator[tuple[NetworkPlace, BridgePort]]:
    for link in stack.links.values():
        master = stack.links.get(link.master) if link.master else None
        if master and master.name in bridges and (link.name in places or link.vxlan):
            yield places.get(link.name, NetworkPlace("device", link.name)), _port(link, bridges[master.name])


def _port(link: Link, network: str) -> BridgePort:
    return BridgePort(
        network=network,
        hairpin=bool(link.hairpin),
        learning=bool(link.learning or (link.vxlan and link.vxlan.learning)),
        broadcast=link.broadcast is not False,
        multicast=link.multicast is not False,
        isolated=bool(link.isolated),
        suppress=bool(link.suppress),
    )
