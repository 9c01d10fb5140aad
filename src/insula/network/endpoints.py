"""Endpoints: addresses that packets are sent from and to. An instance with IPv4 and IPv6 has two endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from insula.model.objects import Network, Port
from insula.network.addresses import OUTSIDE, OUTSIDE6


@dataclass(frozen=True)
class Endpoint:
    """One address of an instance, a gateway, the host or the outside. `network` is an index, 0 for the last two."""

    kind: Literal["instance", "gateway", "host", "outside"]
    tenant: str
    network: int
    name: str
    address: str

    @property
    def label(self) -> str:
        """``tenant/instance``, ``tenant/instance:eth1``, ``tenant/gateway:network``, ``host`` or ``outside``."""
        if self.kind == "instance":
            return f"{self.tenant}/{self.name}"
        return f"{self.tenant}/gateway:{self.name}" if self.kind == "gateway" else self.kind

    @property
    def version(self) -> int:
        return 6 if ":" in self.address else 4


def of_port(port: Port, network: Network) -> list[Endpoint]:
    """Return the endpoints of the instance at a port."""
    found, name = [port.address, port.address6], port_name(port)
    return [Endpoint("instance", port.tenant, network.index, name, address) for address in found if address]


def port_name(port: Port) -> str:
    """Return the name of a port: its instance's, with the interface if it is not the first."""
    return port.instance if port.interface == "eth0" else f"{port.instance}:{port.interface}"


def of_gateway(network: Network) -> list[Endpoint]:
    """Return the endpoints of the tenant's router on a network."""
    found = [network.gateway, network.gateway6]
    return [Endpoint("gateway", network.tenant, network.index, network.name, address) for address in found if address]


def outside(tenant: str) -> list[Endpoint]:
    """Return the endpoints that represent addresses outside of this host, for a tenant."""
    return [Endpoint("outside", tenant, 0, "outside", address) for address in (OUTSIDE, OUTSIDE6)]
