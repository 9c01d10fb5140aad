"""/v1/usage, and below tenants: what tenants have used and reserved over time."""

from __future__ import annotations

from litestar import get

from insula.api.parameters import Flag, Plane, Sender, Since, TenantName
from insula.model.accounting import TenantUsage


@get(
    "/usage",
    tags=["host"],
    summary="What the tenants that one may see have used and reserved",
    permission="self.read",
)
async def all_usage(plane: Plane, sender: Sender, since: Since = None, removed: Flag = False) -> list[TenantUsage]:
    """With `removed` it is that of tenants that were removed since then, for those who see the host."""
    if removed:
        sender.check("host.read")
        return await plane.accounting.removed(since)
    if sender.sees_host:
        return await plane.accounting.all(since)
    among = [tenant for tenant in sender.tenants if "usage.read" in sender.held(tenant)]
    return await plane.accounting.all(since, among)


@get(
    "/tenants/{tenant:str}/usage",
    tags=["tenants"],
    summary="What a tenant has used and reserved; its instances since they were created",
    permission="usage.read",
)
async def tenant_usage(plane: Plane, tenant: TenantName, since: Since = None) -> TenantUsage:
    return await plane.accounting.of(tenant, since)


USAGE_ROUTES = (all_usage, tenant_usage)
