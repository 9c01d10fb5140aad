"""/v1/tenants/{tenant}/routers: what joins a tenant's networks.

The permissions are those of networks: a router is part of a tenant's networks, and whoever may remove one of these may
as well join it with another of the same tenant.
"""

from __future__ import annotations

from litestar import Controller, delete, get, patch, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.pages import Paged
from insula.api.parameters import Name, Plane, TenantName
from insula.model.routers import RouterPatch, RouterSpec, RouterView


class RouterRoutes(Controller):
    path = "/tenants/{tenant:str}/routers"
    tags = ("routers",)

    @get(summary="List a tenant's routers", permission="network.read")
    async def list_routers(self, plane: Plane, tenant: TenantName, labelled: Paged) -> list[RouterView]:
        views = await plane.routers.list(tenant)
        return labelled.of(views, lambda view: view.router.name, labels=lambda view: view.router.labels)

    @post(summary="Create a router between networks", permission="network.write")
    async def create_router(self, plane: Plane, tenant: TenantName, data: JSONBody[RouterSpec]) -> RouterView:
        note(name=data.name, networks=data.networks)
        return await plane.routers.create(tenant, data.name, data.networks, data.routes, data.labels)

    @get("/{router:str}", summary="Show a router and its measured state", permission="network.read")
    async def get_router(self, plane: Plane, tenant: TenantName, router: Name) -> RouterView:
        return await plane.routers.get(tenant, router)

    @patch(
        "/{router:str}",
        summary="Have a router join or leave networks, add or remove routes: all or nothing",
        permission="network.write",
    )
    async def update_router(
        self, plane: Plane, tenant: TenantName, router: Name, data: JSONBody[RouterPatch]
    ) -> RouterView:
        note(join=data.join or None, leave=data.leave or None)
        return await plane.routers.update(tenant, router, data)

    @delete("/{router:str}", summary="Remove a router: its networks are apart then", permission="network.write")
    async def remove_router(self, plane: Plane, tenant: TenantName, router: Name) -> None:
        await plane.routers.remove(tenant, router)
