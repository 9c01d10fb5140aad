"""The part of a fabric that interprets what is installed, for the proof and for traces."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from insula.kernel.netlink import Rtnl
from insula.kernel.nftables import Nft
from insula.model.objects import Tenant
from insula.network.intent import TenantIntent
from insula.network.interpreter.connections import OpenConnection
from insula.network.interpreter.interpretation import Interpretation
from insula.network.interpreter.queues import InstalledQueues
from insula.network.interpreter.space import MakeBoundaries
from insula.network.interpreter.tracing import TracedPacket, TracedWay
from insula.network.linux.calls import Calls, about_host, about_tenant
from insula.network.linux.interpreter.connections import open_connections
from insula.network.linux.interpreter.interpreters import Interpreters, ReadNamespace
from insula.network.linux.interpreter.queues import queues


class HasInterpreters:
    _calls: Calls
    _interpreters: Interpreters

    def _handles(self) -> tuple[Rtnl, Nft]:
        raise NotImplementedError

    def _tenant(self, tenant: Tenant) -> ReadNamespace:
        raise NotImplementedError

    @about_tenant
    def interpret(
        self, tenant: Tenant, intent: TenantIntent, running: Collection[int], cuts: MakeBoundaries
    ) -> Interpretation:
        """Read the tenant's namespace, and compute whom it lets reach whom."""
        return self._interpreters.tenant(self._tenant(tenant), intent, running, cuts)

    @about_host
    def installed_queues(
        self, tenants: Sequence[Tenant], guaranteed: Mapping[str, Sequence[int]] | None = None
    ) -> InstalledQueues:
        """Read filters and classes of the host."""
        return queues(
            self._handles()[0], self._interpreters.uplinks(tenants), self._interpreters.guaranteed(guaranteed or {})
        )

    @about_tenant
    def connections(self, tenant: Tenant, marks: Collection[int]) -> Sequence[OpenConnection]:
        """Read the connection tracking of the tenant's namespace."""
        return open_connections(self._tenant(tenant).tracked, marks)

    @about_tenant
    def trace(self, tenant: Tenant, intent: TenantIntent, packet: TracedPacket) -> TracedWay:
        """Follow a packet through the tenant's namespace."""
        return self._interpreters.trace(self._tenant(tenant), intent, packet)

    @about_tenant
    def trace_host(self, tenant: Tenant, packet: TracedPacket) -> TracedWay:
        """Follow a packet from or to the tenant's uplink through the host."""
        return self._interpreters.trace_host(tenant, packet)

    @about_host
    def interpret_host(self, tenants: Sequence[Tenant], offered: object, cuts: MakeBoundaries) -> Interpretation:
        """Read the host's namespace, and compute what it forwards from and to tenants."""
        return self._interpreters.host(tenants, offered, cuts)
