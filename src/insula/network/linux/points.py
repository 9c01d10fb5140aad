"""The probe points of a tenant: its namespace, and the host's ends of its ports and of its uplink."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from insula.model.objects import Network, Port
from insula.network import endpoints
from insula.network.addresses import uplink_mac
from insula.network.fabric import ProbePoints, RouterPoints, Station
from insula.network.linux import naming
from insula.network.linux.tenant import TenantNamespace


def of_tenant(
    namespace: TenantNamespace, networks: Sequence[Network], ports: Sequence[Port], *, ipv6: bool
) -> ProbePoints:
    """Return the probe points. `networks` are all of the tenant's, `ports` those to probe."""
    tenant, by_name = namespace.tenant, {network.name: network for network in networks}
    (host, _), (host6, _) = namespace.naming.addresses(tenant.index)
    versions = 2 if ipv6 else 1
    stations = tuple(_station(namespace, by_name[port.network], port) for port in ports)
    router = RouterPoints(
        tenant=tenant.name,
        netns=os.dup(namespace.netns),
        gateways=tuple(gateway for network in networks for gateway in endpoints.of_gateway(network)),
        hosts=tuple(endpoints.Endpoint("host", tenant.name, 0, "host", a) for a in (host, host6)[:versions]),
        outsides=tuple(endpoints.outside(tenant.name)[:versions]),
        inside=(naming.UPLINK, *(naming.bridge(network.index) for network in networks)),
        device=namespace.naming.uplink(tenant.index),
        mac=uplink_mac(tenant.index, host=False),
    )
    return ProbePoints(router, stations)


def _station(namespace: TenantNamespace, network: Network, port: Port) -> Station:
    """Return a port's probe point, after a pending change of its carrier has been processed."""
    device = naming.port(port.index)
    with contextlib.suppress(OSError):  # the device is missing, which `installed` reports
        namespace.rtnl.sync_carrier(device)
    return Station(
        endpoints=tuple(endpoints.of_port(port, network)),
        gateways=(network.gateway, *([network.gateway6] if network.gateway6 else [])),
        subnets=(network.subnet, *([network.subnet6] if network.subnet6 else [])),
        device=device,
        index=naming.port_index(port.index),
        mac=port.mac,
    )
