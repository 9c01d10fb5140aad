"""The measured status of networks and routers."""

from __future__ import annotations

from collections.abc import Sequence

from insula.kernel.netns import call_in
from insula.model.objects import Network, NetworkStatus
from insula.model.routers import Router, RouterStatus
from insula.network.linux import naming
from insula.network.linux.deletion import is_gone
from insula.network.linux.dns import resolver
from insula.network.linux.state import gateways
from insula.network.linux.tenant import TenantNamespace


def of_network(namespace: TenantNamespace, network: Network) -> NetworkStatus:
    """Return the status of a network: ready if the gateway has its addresses and the resolver answers there."""
    links = [link for link in namespace.rtnl.links() if not is_gone(link.group)]
    bridge = next((link for link in links if link.name == naming.bridge(network.index)), None)
    if bridge is None or not bridge.up:
        return NetworkStatus(ready=False, reason="the bridge is missing" if bridge is None else "the bridge is down")
    ports = sum(link.master == bridge.index for link in links if naming.number(link.name, "p") is not None)
    present = {a.address for a in namespace.rtnl.addresses() if a.index == bridge.index}
    for address in gateways(network):
        if address not in present:
            return NetworkStatus(ready=False, reason=f"gateway {address} is missing", ports=ports)
    if not call_in(namespace.netns, lambda: resolver.answers(network.gateway, namespace.tenant.name)):
        return NetworkStatus(ready=False, reason=f"no resolver answers at {network.gateway}", ports=ports)
    return NetworkStatus(ready=True, ports=ports)


def of_router(namespace: TenantNamespace, networks: Sequence[Network], router: Router) -> RouterStatus:
    """Return the status of a router: ready if its elements and routes are there. `networks` are all of the tenant's."""
    try:
        gaps = namespace.router_gaps({network.name: network for network in networks}, router)
    except OSError as error:
        return RouterStatus(ready=False, reason=f"it can't be read: {error.strerror or error}")
    return RouterStatus(ready=not gaps, reason=gaps[0] if gaps else None)
