"""`AsyncNetworkOperations`: /v1/tenants/{tenant}/networks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from insula.model.objects import Outbound
from insula.model.tracing import TraceView
from insula.model.views import NetworkPatch, NetworkSpec
from insula.sdk import answers
from insula.sdk._async.calls import AsyncCaller
from insula.sdk.types import AnyNetwork


class AsyncNetworkOperations:
    """A tenant's private networks."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    def list(
        self, tenant: str, *, prefix: str | None = None, labels: Sequence[str] = (), page: int | None = None
    ) -> AsyncIterator[AnyNetwork]:
        """Yield the networks of a tenant: those whose names begin with `prefix`, and that have all `labels`."""
        query = {"prefix": prefix, "label": [*labels]}
        return self._caller.pages(answers.NETWORKS, "tenants", tenant, "networks", query=query, page=page)

    async def create(
        self,
        tenant: str,
        name: str,
        subnet: str,
        *,
        subnet6: str | None = None,
        mtu: int = 1500,
        outbound: Outbound = "nat",
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> AnyNetwork:
        """Create a network with the addresses of `subnet`, as in "10.0.0.0/24"."""
        spec = NetworkSpec(
            name=name, subnet=subnet, subnet6=subnet6, mtu=mtu, outbound=outbound, labels=dict(labels or {})
        )
        return await self._caller.change(
            answers.NETWORK, "POST", "tenants", tenant, "networks", body=spec, key=idempotency_key
        )

    async def get(self, tenant: str, network: str) -> AnyNetwork:
        return await self._caller.get(answers.NETWORK, "tenants", tenant, "networks", network)

    async def update(
        self, tenant: str, network: str, *, outbound: Outbound, idempotency_key: str | None = None
    ) -> AnyNetwork:
        """Change a network's way out."""
        patch = NetworkPatch(outbound=outbound)
        return await self._caller.change(
            answers.NETWORK, "PATCH", "tenants", tenant, "networks", network, body=patch, key=idempotency_key
        )

    async def remove(self, tenant: str, network: str, *, idempotency_key: str | None = None) -> None:
        """Remove a network. Conflict while an instance is on it or a router joins it."""
        await self._caller.do("DELETE", "tenants", tenant, "networks", network, key=idempotency_key)

    async def trace(
        self, tenant: str, source: str, target: str, service: str = "icmp", *, rules: bool = False, live: bool = False
    ) -> TraceView:
        """Tell whether one end reaches another, and why. An end is an instance, instance:interface, an IP address, or
        "outside"; a service is as in tcp/80. With `rules` the installed rules are told, with `live` a packet is sent.
        """
        query = {"source": source, "target": target, "service": service, "rules": rules, "live": live}
        return await self._caller.get(answers.TRACE, "tenants", tenant, "trace", query=query)
