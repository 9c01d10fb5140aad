"""/v1/tenants: the tenants."""

from __future__ import annotations

from litestar import Controller, delete, get, patch, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.parameters import Flag, Name, Plane
from insula.model.views import LimitsPatch, TenantSpec, TenantView


class TenantRoutes(Controller):
    path = "/tenants"
    tags = ("tenants",)

    @get(summary="List the tenants")
    async def list_tenants(self, plane: Plane) -> list[TenantView]:
        return await plane.tenants.list()

    @post(summary="Create a tenant")
    async def create_tenant(self, plane: Plane, data: JSONBody[TenantSpec]) -> TenantView:
        note(tenant=data.name, name=data.name)
        return await plane.tenants.create(data.name, data.limits, data.labels)

    @get("/{tenant:str}", summary="Show a tenant")
    async def get_tenant(self, plane: Plane, tenant: Name) -> TenantView:
        return await plane.tenants.get(tenant)

    @patch("/{tenant:str}", summary="Change a tenant's limits: absent ones stay, null is no limit")
    async def update_tenant(self, plane: Plane, tenant: Name, data: JSONBody[LimitsPatch]) -> TenantView:
        return await plane.tenants.update(tenant, data)

    @delete("/{tenant:str}", summary="Remove a tenant; with `force`, also all that it has")
    async def remove_tenant(self, plane: Plane, tenant: Name, force: Flag = False) -> None:
        if force:
            await plane.clear_tenant(tenant)
        await plane.tenants.remove(tenant)
