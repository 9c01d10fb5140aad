"""Interpret the link layer of a tenant's namespace: forwarding entries of VXLAN devices, and neighbours of bridges."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

from insula.network.interpreter.links import LinkLayer, TunnelEnd
from insula.network.interpreter.space import BITS
from insula.network.linux.interpreter.stack import Stack


def link_layer(stack: Stack, overlays: Mapping[str, str]) -> LinkLayer:
    """Return what leaves by VXLAN devices. `overlays` are the networks by the name of their device."""
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
            if index == link.master:
                neighbours[network, str(ip_address(address.to_bytes(BITS[version] // 8, "big")))] = mac
    return LinkLayer(tunnels, neighbours)
