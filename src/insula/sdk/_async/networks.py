"""`AsyncNetworkOperations`: /v1/tenants/{tenant}/networks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from insula.model.views import NetworkSpec
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
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> AnyNetwork:
        """Create a network with the addresses of `subnet`, as in "10.0.0.0/24"."""
        spec = NetworkSpec(name=name, subnet=subnet, subnet6=subnet6, mtu=mtu, labels=dict(labels or {}))
        return await self._caller.change(
            answers.NETWORK, "POST", "tenants", tenant, "networks", body=spec, key=idempotency_key
        )

    async def get(self, tenant: str, network: str) -> AnyNetwork:
        return await self._caller.get(answers.NETWORK, "tenants", tenant, "networks", network)

    async def remove(self, tenant: str, network: str, *, idempotency_key: str | None = None) -> None:
        """Remove a network. Conflict while an instance is on it."""
        await self._caller.do("DELETE", "tenants", tenant, "networks", network, key=idempotency_key)
