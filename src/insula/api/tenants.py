"""/v1/tenants: the tenants."""

from __future__ import annotations

from litestar import Controller, delete, get, patch, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.pages import Paged
from insula.api.parameters import Flag, Plane, Sender, TenantName
from insula.model.views import TenantPatch, TenantSpec, TenantView


class TenantRoutes(Controller):
    path = "/tenants"
    tags = ("tenants",)

    @get(summary="List the tenants that one may see", permission="self.read")
    async def list_tenants(self, plane: Plane, sender: Sender, labelled: Paged) -> list[TenantView]:
        if sender.sees_host:
            views = await plane.tenants.list()
        else:
            views = [await plane.tenants.get(tenant) for tenant in sorted(sender.tenants)]
        return labelled.of(views, lambda view: view.tenant.name, labels=lambda view: view.tenant.labels)

    @post(summary="Create a tenant", permission="tenant.create")
    async def create_tenant(self, plane: Plane, data: JSONBody[TenantSpec]) -> TenantView:
        note(tenant=data.name, name=data.name)
        return await plane.tenants.create(data.name, data.limits, data.labels)

    @get("/{tenant:str}", summary="Show a tenant", permission="tenant.read")
    async def get_tenant(self, plane: Plane, tenant: TenantName) -> TenantView:
        return await plane.tenants.get(tenant)

    @patch(
        "/{tenant:str}",
        summary="Change a tenant's limits and labels: absent ones stay, null is no limit, or removes a label",
        permission="tenant.limits",
    )
    async def update_tenant(self, plane: Plane, tenant: TenantName, data: JSONBody[TenantPatch]) -> TenantView:
        return await plane.tenants.update(tenant, data)

    @delete("/{tenant:str}", summary="Remove a tenant; with `force`, also all that it has", permission="tenant.remove")
    async def remove_tenant(self, plane: Plane, tenant: TenantName, force: Flag = False) -> None:
        if force:
            await plane.clear_tenant(tenant)
        await plane.tenants.remove(tenant)
