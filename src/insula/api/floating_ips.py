"""/v1/tenants/{tenant}/floating-ips: external addresses that lead to a tenant's instances."""

from __future__ import annotations

from litestar import Controller, delete, get, patch, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.pages import Paged
from insula.api.parameters import Name, Plane, TenantName
from insula.model.floating_ips import FloatingIpPatch, FloatingIpSpec, FloatingIpView


class FloatingIpRoutes(Controller):
    path = "/tenants/{tenant:str}/floating-ips"
    tags = ("floating-ips",)

    @get(summary="List a tenant's floating addresses", permission="floating-ip.read")
    async def list_floating_ips(self, plane: Plane, tenant: TenantName, labelled: Paged) -> list[FloatingIpView]:
        views = await plane.floating_ips.list(tenant)
        return labelled.of(views, lambda view: view.floating_ip.name, labels=lambda view: view.floating_ip.labels)

    @post(summary="Allocate a floating address, and attach it to an instance", permission="floating-ip.write")
    async def allocate_floating_ip(
        self, plane: Plane, tenant: TenantName, data: JSONBody[FloatingIpSpec]
    ) -> FloatingIpView:
        made = await plane.floating_ips.allocate(tenant, data)
        note(name=made.floating_ip.name, address=made.floating_ip.address, instance=data.instance)
        return made

    @get("/{floating_ip:str}", summary="Show a floating address", permission="floating-ip.read")
    async def get_floating_ip(self, plane: Plane, tenant: TenantName, floating_ip: Name) -> FloatingIpView:
        return await plane.floating_ips.get(tenant, floating_ip)

    @patch(
        "/{floating_ip:str}",
        summary="Attach a floating address to an instance, or detach it",
        permission="floating-ip.write",
    )
    async def update_floating_ip(
        self, plane: Plane, tenant: TenantName, floating_ip: Name, data: JSONBody[FloatingIpPatch]
    ) -> FloatingIpView:
        note(instance=data.instance or None)
        return await plane.floating_ips.update(tenant, floating_ip, data)

    @delete("/{floating_ip:str}", summary="Release a floating address", permission="floating-ip.write")
    async def release_floating_ip(self, plane: Plane, tenant: TenantName, floating_ip: Name) -> None:
        await plane.floating_ips.remove(tenant, floating_ip)
