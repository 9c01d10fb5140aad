"""`AsyncTenantOperations`: /v1/tenants."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Unpack

from msgspec import UNSET

from insula.client.http import target
from insula.model.accounting import TenantUsage
from insula.model.views import LimitsPatch, StatsSample, TenantPatch, TenantSpec
from insula.sdk import answers
from insula.sdk._async.calls import AsyncCaller, request
from insula.sdk._async.items import AsyncItems, lines
from insula.sdk.types import AnyTenant, LimitOptions


class AsyncTenantOperations:
    """Tenants and their limits."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    def list(
        self, *, prefix: str | None = None, labels: Sequence[str] = (), page: int | None = None
    ) -> AsyncIterator[AnyTenant]:
        """Yield the tenants that one may see: those whose names begin with `prefix`, and that have all `labels`, each
        NAME=VALUE, or NAME with any value. `page` is the number of those that one request brings."""
        query = {"prefix": prefix, "label": [*labels]}
        return self._caller.pages(answers.TENANTS, "tenants", query=query, page=page)

    async def create(
        self,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        **limits: Unpack[LimitOptions],
    ) -> AnyTenant:
        """Create a tenant."""
        spec = TenantSpec(name=name, limits=LimitsPatch(**limits), labels=dict(labels or {}))
        return await self._caller.change(answers.TENANT, "POST", "tenants", body=spec, key=idempotency_key)

    async def get(self, tenant: str) -> AnyTenant:
        return await self._caller.get(answers.TENANT, "tenants", tenant)

    async def update(
        self,
        tenant: str,
        *,
        labels: Mapping[str, str | None] | None = None,
        idempotency_key: str | None = None,
        **limits: Unpack[LimitOptions],
    ) -> AnyTenant:
        """Change the given limits and labels. A label with the value None is removed."""
        patch = TenantPatch(labels=UNSET if labels is None else dict(labels), **limits)
        return await self._caller.change(answers.TENANT, "PATCH", "tenants", tenant, body=patch, key=idempotency_key)

    async def remove(self, tenant: str, *, force: bool = False, idempotency_key: str | None = None) -> None:
        """Remove a tenant. Conflict while it has instances, networks or images, unless `force`, which removes these."""
        await self._caller.do("DELETE", "tenants", tenant, query={"force": force}, key=idempotency_key)

    async def usage(self, tenant: str, *, since: float | None = None) -> TenantUsage:
        """Return what a tenant has used and reserved since a time (seconds since the epoch), or since it was created;
        with its instances, each since it was created."""
        return await self._caller.get(answers.TENANT_USAGE, "tenants", tenant, "usage", query={"since": since})

    async def metrics(self, tenant: str) -> str:
        """Return the metrics of a tenant and its instances, in the text format of Prometheus."""
        return await self._caller.text(target("tenants", tenant, "metrics"))

    def stats(
        self, tenant: str, *, names: Sequence[str] = (), interval: float | None = None
    ) -> AsyncItems[StatsSample]:
        """Yield the usage of these instances, or of all running ones: once, or every `interval` seconds."""
        query = {"name": [*names], "interval": interval}
        sent = request("GET", "tenants", tenant, "stats", query=query)
        return AsyncItems(self._caller, sent, lines(answers.STATS_SAMPLE))
