"""The reference model of links: where frames for instances on other hosts should go, by the tenant's intent alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from ipaddress import ip_address

from insula.model.objects import Port
from insula.network.addresses import host_mac, link_local
from insula.network.endpoints import port_name
from insula.network.intent import PeeringIntent, RemotePort, TenantIntent
from insula.network.interpreter.delivery import NetworkPlace
from insula.network.interpreter.links import BridgePort, LinkLayer, TunnelEnd


def remotes(intent: TenantIntent) -> list[RemotePort]:
    """Return the ports on other hosts. One that is here too has moved here."""
    here = {(port.network, port.mac) for port in intent.ports}
    known = {network.name for network in intent.networks}
    return [each for each in intent.remotes if each.network in known and (each.network, each.mac) not in here]


def addresses_of(remote: RemotePort) -> list[str]:
    """Return the addresses of a port on another host, with IPv6 the link-local one as well."""
    six = any(":" in address for address in remote.addresses)
    return [*remote.addresses, *([link_local(remote.mac)] if six else [])]


def links(intent: TenantIntent, running: Collection[int]) -> LinkLayer:
    """Return the only hosts that frames may go to, the neighbours that are on them, and what may be on bridges: a
    device for ports on other hosts need not. `running` are the indices of the ports that are plugged."""
    vnis = {network.name: network.vni for network in intent.networks}
    beyond, peers = remotes(intent), [*_of_peerings(intent)]
    known = vnis.keys()
    ports = {
        NetworkPlace("port", port_name(port)): _port(port)
        for port in intent.ports
        if port.network in known and port.index in running
    }
    overlays = {NetworkPlace("overlay", each): BridgePort(each, suppress=True) for each in vnis}
    return LinkLayer(
        {
            **{(each.network, each.mac): frozenset([TunnelEnd(each.host, vnis[each.network])]) for each in beyond},
            **{(f"peering {p.name}", host_mac(h)): frozenset([TunnelEnd(h, p.peer_vni or 0)]) for p, h, _ in peers},
        },
        {
            **{(each.network, str(ip_address(a))): each.mac for each in beyond for a in addresses_of(each)},
            **{(f"peering {p.name}", str(ip_address(a))): host_mac(h) for p, h, some in peers for a in some},
        },
        {**ports, **overlays},
    )


def _port(port: Port) -> BridgePort:
    """Return what a port of an instance is: its MAC address is known, others that it may have are learned."""
    learning = any(pair.mac not in (None, port.mac) for pair in port.allowed_pairs)
    return BridgePort(port.network, hairpin=True, learning=learning, broadcast=True, multicast=True)


def _of_peerings(intent: TenantIntent) -> Iterator[tuple[PeeringIntent, str, Sequence[str]]]:
    """Yield the hosts that instances of this host reach by a peering, each with addresses of the peer there. Those of
    service endpoints are the fabric's own."""
    used = {port.network for port in intent.ports}
    for peering in intent.peerings:
        if used.isdisjoint({*peering.networks, *(each.network for each in peering.consumes)}):
            continue
        for remote in peering.remotes:
            yield peering, remote.host, remote.addresses
        for host in (*(each.host for each in peering.consumes), *peering.clients.values()):
            if host is not None:
                yield peering, host, ()


def owner(intent: TenantIntent, network: str, mac: str) -> RemotePort | Port | None:
    """Return the port of a network with this MAC address."""
    every: list[RemotePort | Port] = [*intent.ports, *remotes(intent)]
    return next((each for each in every if (each.network, each.mac) == (network, mac)), None)
