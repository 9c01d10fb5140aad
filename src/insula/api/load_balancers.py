"""/v1/tenants/{tenant}/load-balancers: addresses whose connections are spread over a tenant's instances."""

from __future__ import annotations

from litestar import Controller, delete, get, patch, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.pages import Paged
from insula.api.parameters import Name, Plane, TenantName
from insula.model.load_balancers import LoadBalancerPatch, LoadBalancerSpec, LoadBalancerView


class LoadBalancerRoutes(Controller):
    path = "/tenants/{tenant:str}/load-balancers"
    tags = ("load-balancers",)

    @get(summary="List a tenant's load balancers", permission="load-balancer.read")
    async def list_load_balancers(self, plane: Plane, tenant: TenantName, labelled: Paged) -> list[LoadBalancerView]:
        views = await plane.load_balancers.list(tenant)
        return labelled.of(views, lambda view: view.name, labels=lambda view: view.labels)

    @post(summary="Create a load balancer", permission="load-balancer.write")
    async def create_load_balancer(
        self, plane: Plane, tenant: TenantName, data: JSONBody[LoadBalancerSpec]
    ) -> LoadBalancerView:
        note(name=data.name)
        return await plane.load_balancers.create(tenant, data)

    @get(
        "/{load_balancer:str}",
        summary="Show a load balancer, and which of its backends get connections, and why",
        permission="load-balancer.read",
    )
    async def get_load_balancer(self, plane: Plane, tenant: TenantName, load_balancer: Name) -> LoadBalancerView:
        return await plane.load_balancers.get(tenant, load_balancer)

    @patch(
        "/{load_balancer:str}",
        summary="Change ports, backends, affinity or checks of a load balancer",
        permission="load-balancer.write",
    )
    async def update_load_balancer(
        self, plane: Plane, tenant: TenantName, load_balancer: Name, data: JSONBody[LoadBalancerPatch]
    ) -> LoadBalancerView:
        return await plane.load_balancers.update(tenant, load_balancer, data)

    @delete("/{load_balancer:str}", summary="Remove a load balancer", permission="load-balancer.write")
    async def remove_load_balancer(self, plane: Plane, tenant: TenantName, load_balancer: Name) -> None:
        await plane.load_balancers.remove(tenant, load_balancer)
