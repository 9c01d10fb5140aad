"""/v1/tenants/{tenant}/guarantee: floors and ceilings of a tenant as a whole, which operators set; and
/v1/tenants/{tenant}/guarantees: all of the tenant, where its members set those of instances.

The floors of instances are parts of those of the tenant, so that no member takes anything from other tenants.
"""

from __future__ import annotations

from litestar import Controller, delete, get, patch
from litestar.params import JSONBody

from insula.api.pages import Paged
from insula.api.parameters import Name, Plane, TenantName
from insula.model.guarantees import GuaranteePatch, GuaranteeView


class GuaranteeRoutes(Controller):
    path = "/tenants/{tenant:str}"
    tags = ("guarantees",)

    @get("/guarantees", summary="List the guarantees of a tenant and of its instances", permission="guarantee.read")
    async def list_guarantees(self, plane: Plane, tenant: TenantName, labelled: Paged) -> list[GuaranteeView]:
        views = await plane.guarantees.list(tenant)
        return labelled.of(views, lambda view: view.instance or "")

    @get("/guarantee", summary="Show what a tenant as a whole is guaranteed", permission="guarantee.read")
    async def get_tenant_guarantee(self, plane: Plane, tenant: TenantName) -> GuaranteeView:
        return await plane.guarantees.get(tenant)

    @patch(
        "/guarantee",
        summary="Change floors and ceilings of a tenant as a whole: absent ones stay, null is none",
        permission="tenant.guarantee",
    )
    async def set_tenant_guarantee(
        self, plane: Plane, tenant: TenantName, data: JSONBody[GuaranteePatch]
    ) -> GuaranteeView:
        return await plane.guarantees.set(tenant, data)

    @delete("/guarantee", summary="Remove all floors and ceilings of a tenant", permission="tenant.guarantee")
    async def clear_tenant_guarantee(self, plane: Plane, tenant: TenantName) -> None:
        await plane.guarantees.clear(tenant)

    @get("/guarantees/{instance:str}", summary="Show what an instance is guaranteed", permission="guarantee.read")
    async def get_guarantee(self, plane: Plane, tenant: TenantName, instance: Name) -> GuaranteeView:
        return await plane.guarantees.get(tenant, instance)

    @patch(
        "/guarantees/{instance:str}",
        summary="Change floors and ceilings of an instance: absent ones stay, null is none",
        permission="guarantee.write",
    )
    async def set_guarantee(
        self, plane: Plane, tenant: TenantName, instance: Name, data: JSONBody[GuaranteePatch]
    ) -> GuaranteeView:
        return await plane.guarantees.set(tenant, data, instance)

    @delete(
        "/guarantees/{instance:str}",
        summary="Remove all floors and ceilings of an instance",
        permission="guarantee.write",
    )
    async def clear_guarantee(self, plane: Plane, tenant: TenantName, instance: Name) -> None:
        await plane.guarantees.clear(tenant, instance)
