"""Read the installed state of a tenant from the kernel, and report differences from what the fabric installs.

Checked here is what holds for any tenant: rules, settings, and that devices, addresses, forwarding entries and set
elements are consistent. `insula.network.reachability` checks whether the right networks and ports exist.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from insula.kernel.netlink.messages import Link, Neighbour, Route, Rule
from insula.kernel.netns import call_in
from insula.network.addresses import gateway_mac
from insula.network.fabric import Installed, InstalledNetwork, InstalledPort
from insula.network.linux import naming, overlay, routing, rules, sysctl
from insula.network.linux.deletion import is_gone
from insula.network.linux.drift import rule_drift
from insula.network.linux.peerings import peer_overlay, transit
from insula.network.linux.tenant import FAMILIES, TenantNamespace

_OURS: Final = ("br", "p", "vx", naming.EGRESS, naming.PEERING, naming.PEERING_VXLAN)
"""The beginnings of the names of devices."""


def read(namespace: TenantNamespace, *, ipv6: bool) -> Installed:
    """Read the installed state of the tenant, with differences."""
    links = {link.index: link for link in namespace.rtnl.links() if not is_gone(link.group)}
    elements = namespace.elements()
    addresses = defaultdict(list)
    for address in namespace.rtnl.addresses():
        if not address.link_local:
            addresses[address.index].append(address.address)
    forwarding = namespace.rtnl.neighbours(socket.AF_BRIDGE)
    routes = namespace.rtnl.routes()
    services = transit.ServiceState(namespace.netns, namespace.nft, namespace.naming)
    _leave_out(addresses, links, services.endpoints())
    networks = [
        msgspec.structs.replace(
            _network(index, link, addresses[link.index], links.get(naming.vxlan_index(index)), forwarding),
            **_reach(link, elements, routes),
        )
        for link in links.values()
        if (index := naming.number(link.name, "br")) is not None
    ]
    ports = [
        _port(index, link, links, elements)
        for link in links.values()
        if (index := naming.number(link.name, "p")) is not None
    ]
    drift = [
        *call_in(namespace.netns, lambda: sysctl.differences(sysctl.ROUTER)),
        *rule_drift(namespace.nft, namespace.naming.prefix, FAMILIES, rules.tenant_rules(namespace.naming.prefix)),
        *_uplink_drift(namespace, links, addresses, ipv6=ipv6),
        *_network_drift(networks, links, elements),
        *_routing_drift(networks, namespace.rtnl.rules(), elements),
        *_port_drift(ports, links, forwarding, elements),
        *_overlay_drift(namespace, links, forwarding, elements),
        *_peering_drift(namespace, links),
        *_peer_overlay_drift(namespace, links, elements),
        *services.drift(),
        *_orphans(links, elements),
        *namespace.policy.drift(),
    ]
    return Installed(
        tenant=namespace.tenant.name,
        namespace=True,
        networks=networks,
        ports=ports,
        rules=namespace.nft.run("list ruleset"),
        drift=drift,
    )


def _leave_out(addresses: dict[int, list[str]], links: dict[int, Link], endpoints: dict[str, set[str]]) -> None:
    """Leave out the addresses of service endpoints, which bridges have beside those of gateways."""
    for link in links.values():
        mine = endpoints.get(link.name, set())
        addresses[link.index] = [each for each in addresses[link.index] if each.partition("/")[0] not in mine]


def _network(
    index: int, link: Link, addresses: list[str], vxlan: Link | None, forwarding: list[Neighbour]
) -> InstalledNetwork:
    return InstalledNetwork(
        index=index,
        device=link.name,
        gateways=sorted(addresses),
        mtu=link.mtu,
        up=link.up,
        vni=vxlan.vxlan.vni if vxlan and vxlan.vxlan else None,
        remotes={entry.mac: entry.host for entry in forwarding if vxlan and entry.index == vxlan.index and entry.host},
    )


def _reach(link: Link, elements: dict[str, set[tuple[str, ...]]], routes: list[Route]) -> dict[str, Any]:
    """Where connections from a bridge may go, as fields of InstalledNetwork."""
    to = {other for one, other in elements.get("inet paths", ()) if one == link.name}
    router = _router(link.name, elements)
    to |= {device for device, number in elements.get("inet joined", ()) if number == router}
    networks = [number for name in to if (number := naming.number(name, "br")) is not None]
    static = {r.destination: r.gateway for r in routes if str(r.table) == router and r.gateway}
    return {"reaches": sorted(networks), "outbound": naming.UPLINK in to, "routes": static}


def _router(device: str, elements: dict[str, set[tuple[str, ...]]]) -> str | None:
    """Return the number of the router that joins a network, as text."""
    return next((number for name, number in elements.get(routing.ROUTERS, ()) if name == device), None)


def _port(index: int, link: Link, links: dict[int, Link], elements: dict[str, set[tuple[str, ...]]]) -> InstalledPort:
    def allowed(name: str) -> list[str]:
        return sorted({element[-1] for element in elements.get(f"bridge {name}", ()) if element[0] == link.name})

    master = links.get(link.master) if link.master else None
    return InstalledPort(
        index=index,
        device=link.name,
        network=naming.number(master.name, "br") if master else None,
        macs=allowed("macs"),
        addresses=allowed("ipv4"),
        addresses6=allowed("ipv6"),
        up=link.up and link.carrier,
    )


def _uplink_drift(
    namespace: TenantNamespace, links: dict[int, Link], addresses: dict[int, list[str]], *, ipv6: bool
) -> Iterator[str]:
    uplink = next((link for link in links.values() if link.name == naming.UPLINK), None)
    if uplink is None or not uplink.up:
        yield f"device {naming.UPLINK} is {'down' if uplink else 'missing'}"
        return
    (theirs, ours), (theirs6, ours6) = namespace.naming.addresses(namespace.tenant.index)
    wanted = {f"{ours}/31", *([f"{ours6}/127"] if ipv6 else [])}
    for address in sorted(wanted ^ set(addresses[uplink.index])):
        yield f"address {address} of {naming.UPLINK} is {'missing' if address in wanted else 'not ours'}"
    routes = namespace.rtnl.default_routes()
    for gateway in (theirs, theirs6) if ipv6 else (theirs,):
        if (uplink.index, gateway) not in routes:
            yield f"no default route to {gateway} through {naming.UPLINK}"


def _network_drift(
    networks: list[InstalledNetwork], links: dict[int, Link], elements: dict[str, set[tuple[str, ...]]]
) -> Iterator[str]:
    for network in networks:
        link = links.get(naming.bridge_index(network.index))
        if not link or link.kind != "bridge" or link.mac != gateway_mac(network.index):
            yield f"device {network.device} is not the bridge it should be"
        if not network.up:
            yield f"device {network.device} is down"
        known = {
            element[1]
            for name in ("gateways4", "gateways6")
            for element in elements.get(f"inet {name}", ())
            if element[0] == network.device
        }
        have = {gateway.partition("/")[0] for gateway in network.gateways}
        for address in sorted(known ^ have):
            where = "on the device" if address in known else "in the rules"
            yield f"gateway {address} of {network.device} is missing {where}"
        for name, element in (("bridges", (network.device,)), ("paths", (network.device, network.device))):
            if element not in elements.get(f"inet {name}", ()):
                yield f"{network.device} is missing in set {name}"


def _routing_drift(
    networks: list[InstalledNetwork], found: Sequence[Rule], elements: dict[str, set[tuple[str, ...]]]
) -> Iterator[str]:
    """Return networks whose static routes are not looked up, and gateways that don't answer the networks of their
    router."""
    for network in networks:
        router = _router(network.device, elements)
        for family, version in ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6")):
            has = any((":" in to) == (family == socket.AF_INET6) for to in network.routes)
            if has and not any(rule[:3] == (family, network.device, int(router or 0)) for rule in found):
                yield f"{version} routes of {network.device} are not looked up"
        for gateway in (each.partition("/")[0] for each in network.gateways if router):
            name = "routed6" if ":" in gateway else "routed4"
            if (gateway, router) not in elements.get(f"inet {name}", ()):
                yield f"gateway {gateway} is missing in set {name}"


def _port_drift(
    ports: list[InstalledPort],
    links: dict[int, Link],
    forwarding: list[Neighbour],
    elements: dict[str, set[tuple[str, ...]]],
) -> Iterator[str]:
    for port in ports:
        link = links.get(naming.port_index(port.index))
        if link is None:
            yield f"device {port.device} has the wrong interface index"
            continue
        if not port.up:
            yield f"device {port.device} is down" if not link.up else f"device {port.device} has no carrier"
        if port.network is None:
            yield f"device {port.device} is on no bridge"
        if (link.learning and len(port.macs) < 2) or link.flood:
            yield f"device {port.device} learns addresses or is flooded"
        if not link.hairpin:
            yield f"device {port.device} does not send back what its instance sends to itself through the router"
        if not port.macs or not port.addresses:
            yield f"device {port.device} has no rule elements"
        if any((port.device,) not in elements.get(name, ()) for name in rules.COUNTED):
            yield f"packets of device {port.device} are not counted"
        written = {entry.mac for entry in forwarding if entry.index == link.index and entry.permanent}
        if not written & {*port.macs}:  # others are learned: see pairs.py
            yield f"device {port.device} has no forwarding entry for {', '.join(port.macs)}"


def _overlay_drift(
    namespace: TenantNamespace,
    links: dict[int, Link],
    forwarding: list[Neighbour],
    elements: dict[str, set[tuple[str, ...]]],
) -> Iterator[str]:
    """Check VXLAN devices: what they accept, and that each allowed MAC address is that of a port on one other host."""
    by_name = {link.name: link for link in links.values()}
    neighbours = {
        (entry.index, entry.mac)
        for family in (socket.AF_INET, socket.AF_INET6)
        for entry in namespace.rtnl.neighbours(family)
        if entry.permanent
    }
    for link in links.values():
        if (network := naming.number(link.name, "vx")) is None:
            continue
        if link.vxlan is None or not overlay.is_outside(link, by_name):
            yield f"device {link.name} is not the VXLAN device it should be"
        elif link.vxlan.learning or not overlay.is_closed(link):
            yield f"device {link.name} learns addresses or is flooded"
        if link.index != naming.vxlan_index(network) or link.master != naming.bridge_index(network):
            yield f"device {link.name} is not on {naming.bridge(network)}"
        if not link.up:
            yield f"device {link.name} is down"
        allowed = {element[1] for element in elements.get("bridge macs", ()) if element[0] == link.name}
        allowed.discard(gateway_mac(network))  # of packets that other hosts have routed
        sent = {entry.mac for entry in forwarding if entry.index == link.index and entry.host is not None}
        bridged = {entry.mac for entry in forwarding if entry.index == link.index and entry.host is None}
        for mac in sorted(sent ^ allowed):
            yield f"device {link.name} has {'a host for' if mac in sent else 'no host for'} {mac}"
        for mac in sorted(allowed):
            if mac not in bridged:
                yield f"device {link.name} has no forwarding entry for {mac}"
            if (naming.bridge_index(network), mac) not in neighbours:
                yield f"{naming.bridge(network)} has no neighbour entry for {mac}"


def _peering_drift(namespace: TenantNamespace, links: dict[int, Link]) -> Iterator[str]:
    """Check devices that lead to other tenants: that they are up, and that packets find the way to the other end."""
    routes = namespace.rtnl.routes()
    for link in links.values():
        if naming.number(link.name, naming.PEERING) is None:
            continue
        if link.kind != "veth" or link.namespace is None:
            yield f"device {link.name} does not lead to another namespace"
        if not link.up:
            yield f"device {link.name} is down"
        hops = {route.gateway for route in routes if route.link == link.index}
        known = {
            entry.address
            for family in (socket.AF_INET, socket.AF_INET6)
            for entry in namespace.rtnl.neighbours(family)
            if entry.permanent and entry.index == link.index
        }
        for hop in sorted(hop for hop in hops - known if hop):
            yield f"next hop {hop} of {link.name} is unknown"


def _peer_overlay_drift(
    namespace: TenantNamespace, links: dict[int, Link], elements: dict[str, set[tuple[str, ...]]]
) -> Iterator[str]:
    """Check devices that lead to other tenants on other hosts."""
    visitors = [*elements.get("inet visitors4", ()), *elements.get("inet visitors6", ())]
    by_name = {link.name: link for link in links.values()}
    for link in links.values():
        if naming.number(link.name, naming.PEERING_VXLAN) is not None:
            known = [address for device, address in visitors if device == link.name]
            yield from peer_overlay.drift(namespace.rtnl, link, by_name, known)


def _orphans(links: dict[int, Link], elements: dict[str, set[tuple[str, ...]]]) -> Iterator[str]:
    """Return unknown devices, and devices that set elements allow although they don't exist. A counter may outlive its
    device until it was read, and a peer may be on other hosts only."""
    names = {link.name for link in links.values()}
    names |= {naming.peering(index) for name in names if (index := naming.number(name, naming.PEERING_VXLAN))}
    others = (*rules.COUNTERS, "inet routed4", "inet routed6")
    allowed = {each[0] for name, some in elements.items() if name not in others for each in some}
    for device in sorted(allowed - names):
        yield f"rule elements of {device}, which does not exist"
    for link in links.values():
        if link.name not in ("lo", naming.UPLINK, naming.RATES) and all(
            naming.number(link.name, head) is None for head in _OURS
        ):
            yield f"device {link.name} is not ours"
