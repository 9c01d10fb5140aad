"""The peerings of all tenants on this host, as their last intents have them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import call_in
from insula.model.errors import InsulaError
from insula.model.objects import Port, Tenant
from insula.model.peerings import DOMAIN
from insula.network.intent import PeeringIntent, TenantIntent
from insula.network.linux import namespaces, peering, transit
from insula.network.linux.naming import Naming
from insula.network.linux.records import TenantRecords
from insula.network.linux.reporting import recording
from insula.network.linux.tenant import TenantNamespace


class Peers:
    """Peerings by tenant. A peering is made by whichever of its tenants is applied when both have a namespace."""

    def __init__(self, names: Naming, tenants: TenantRecords) -> None:
        self._naming = names
        self._tenants = tenants
        self._peerings: dict[str, Sequence[PeeringIntent]] = {}

    def apply(self, namespace: TenantNamespace, intent: TenantIntent, errors: dict[str, InsulaError]) -> None:
        """Make or repair both ends of a tenant's peerings. Errors are added to `errors`."""
        for each in intent.peerings:
            with recording(errors, f"peering {each.name}"):
                self._join(namespace, intent, each)
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

    def _join(self, namespace: TenantNamespace, intent: TenantIntent, joined: PeeringIntent) -> None:
        netns = namespaces.open_named(self._naming.namespace(joined.peer.name))
        if netns is None:
            return
        try:
            own = [network for network in intent.networks if network.name in joined.networks]
            with call_in(netns, Rtnl) as rtnl:
                beyond, back = (joined.others, own) if joined.routed else ((), ())
                has_services = joined.consumes or joined.provides
                between = transit.subnets(joined.index, self._naming.range6) if has_services else ()
                here = peering.PeeringEnd(namespace.netns, namespace.rtnl, own, beyond, between)
                there = peering.PeeringEnd(netns, rtnl, joined.others, back, between)
                peering.ensure(joined.index, here, there, first=intent.tenant.name < joined.peer.name)
        finally:
            os.close(netns)
