"""The peerings of all tenants on this host, as their last intents have them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import call_in
from insula.model.errors import InsulaError
from insula.model.objects import Network, Port, Tenant
from insula.model.peerings import DOMAIN
from insula.network.intent import PeeringIntent, TenantIntent
from insula.network.linux import namespaces
from insula.network.linux.naming import Naming
from insula.network.linux.peerings import peer_overlay, peering, transit
from insula.network.linux.records import TenantRecords
from insula.network.linux.reporting import recording
from insula.network.linux.tenant import TenantNamespace
from insula.network.linux.underlay import Members
from insula.network.routes import subnets


class Peers:
    """Peerings by tenant. A peering is made by whichever of its tenants is applied when both have a namespace."""

    def __init__(self, names: Naming, tenants: TenantRecords) -> None:
        self._naming = names
        self._tenants = tenants
        self._peerings: dict[str, Sequence[PeeringIntent]] = {}

    def apply(
        self, namespace: TenantNamespace, intent: TenantIntent, members: Members | None, errors: dict[str, InsulaError]
    ) -> None:
        """Make or repair a tenant's peerings: both ends here, and its own ends with other hosts, which are `members`.
        Errors are added to `errors`."""
        for each in intent.peerings:
            with recording(errors, f"peering {each.name}"):
                is_here = self._join(namespace, intent, each)
                self._join_hosts(namespace, intent, each, members, is_here=is_here)
        self._peerings[intent.tenant.name] = intent.peerings
        with recording(errors, "endpoints"), call_in(namespace.netns, NftablesSocket) as nftables:
            networks = {network.name: network for network in intent.networks}
            want = transit.wanted(intent.tenant.name, networks, intent.peerings, self._naming.range6)
            changed = transit.apply(namespace.nft, nftables, self._naming.prefix, want, self._naming.range6)
            if changed:
                call_in(namespace.netns, lambda: transit.cut(changed))

    def forget(self, tenant: str) -> None:
        self._peerings.pop(tenant, None)

    def names(self, intent: TenantIntent) -> Mapping[str, Sequence[str]]:
        """Return the names of the peers' instances, with their addresses, as the tenant's resolver answers them."""
        return {
            f"{name}.{each.peer.name}.{DOMAIN}": addresses
            for each in intent.peerings
            for name, addresses in each.names.items()
        }

    def names_beyond(self, tenant: Tenant, port: Port) -> list[tuple[Tenant, str]]:
        """Return the tenants that reach a port by a peering and are here, with the instance's name there."""
        peerings = [each for each in self._peerings.get(tenant.name, ()) if each.routed]
        joined = [each for each in peerings if port.network in each.networks]
        name = f"{port.instance}.{tenant.name}.{DOMAIN}"
        return [(each.peer, name) for each in joined if self._tenants.has(each.peer)]

    def _join(self, namespace: TenantNamespace, intent: TenantIntent, joined: PeeringIntent) -> bool:
        """Make or repair both ends on this host. Returns whether the peer has a namespace here."""
        netns = namespaces.open_named(self._naming.namespace(joined.peer.name))
        if netns is None:
            return False
        try:
            own = _own(intent, joined)
            with call_in(netns, Rtnl) as rtnl:
                beyond, back = (joined.others, own) if joined.routed else ((), ())
                between = self._transit(joined)
                here = peering.PeeringEnd(namespace.netns, namespace.rtnl, own, beyond, between)
                there = peering.PeeringEnd(netns, rtnl, joined.others, back, between)
                peering.ensure(joined.index, here, there, first=intent.tenant.name < joined.peer.name)
        finally:
            os.close(netns)
        return True

    def _join_hosts(
        self,
        namespace: TenantNamespace,
        intent: TenantIntent,
        joined: PeeringIntent,
        members: Members | None,
        *,
        is_here: bool,
    ) -> None:
        """Make or repair the tenant's end with other hosts, or remove it if nobody needs it."""
        if peer_overlay.is_needed(joined, intent.ports):
            hosts = peer_overlay.hosts_of(joined, self._naming.range6)
            others = [str(subnet) for network in joined.others if joined.routed for subnet in subnets(network)]
            whole = () if is_here else (*others, *self._transit(joined))
            own = _own(intent, joined)
            end = peer_overlay.PeerHosts(joined, namespace.netns, namespace.rtnl, own, hosts, whole)
            peer_overlay.apply(end, members, complete=intent.complete)
        elif intent.complete:
            peer_overlay.delete(namespace.rtnl, joined.index)

    def _transit(self, joined: PeeringIntent) -> Sequence[str]:
        """Return the ranges of the peering's transit addresses, if it has service endpoints."""
        return transit.subnets(joined.index, self._naming.range6) if joined.consumes or joined.provides else ()


def _own(intent: TenantIntent, joined: PeeringIntent) -> list[Network]:
    """Return the tenant's networks in a peering."""
    return [network for network in intent.networks if network.name in joined.networks]
