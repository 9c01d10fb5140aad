"""`PortLease`: what the guest at a port is told about its network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from insula.model.objects import Network, Port
from insula.model.routers import Router
from insula.network.addresses import gateway_mac

SECONDS: Final = 7 * 86400
"""For how long an answer is valid. Guests ask again after half of it: see RFC 2131, 4.4.5, and RFC 8415, 21.4."""


@dataclass(frozen=True)
class PortLease:
    """The addresses of a port, and what its network has. `routes` are destinations that are reached through the
    gateway, of both IP versions; the first port of an instance has the default routes among them."""

    mac: str
    gateway_mac: str
    name: str
    domain: str
    mtu: int
    subnet: str
    gateway: str
    address: str
    subnet6: str | None
    gateway6: str | None
    address6: str | None
    routes: tuple[str, ...]
    first: bool

    def routes_of(self, version: int) -> list[str]:
        """The destinations of one IP version, without the default route."""
        return [each for each in self.routes if (":" in each) == (version == 6)]


def lease_of(network: Network, port: Port, router: Router | None, joined: Iterable[Network], first: bool) -> PortLease:
    """Return the lease of a port. `router` is that of its network, and `joined` are the networks that it joins."""
    others = (each for each in joined if each.name != network.name)
    routes = [subnet for each in others for subnet in (each.subnet, each.subnet6) if subnet]
    routes += [route.destination for route in router.routes] if router else []
    return PortLease(
        mac=port.mac,
        gateway_mac=gateway_mac(network.index),
        name=port.instance,
        domain=f"{port.tenant}.internal",
        mtu=network.mtu,
        subnet=network.subnet,
        gateway=network.gateway,
        address=port.address,
        subnet6=network.subnet6,
        gateway6=network.gateway6,
        address6=port.address6,
        routes=tuple(each for each in routes if ip_network(each).prefixlen),
        first=first,
    )
