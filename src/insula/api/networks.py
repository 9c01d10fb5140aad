"""/v1/tenants/{tenant}/networks: a tenant's private networks."""

from __future__ import annotations

from litestar import Controller, delete, get, patch, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.pages import Paged
from insula.api.parameters import Name, Plane, TenantName
from insula.model.views import NetworkPatch, NetworkSpec, NetworkView


class NetworkRoutes(Controller):
    path = "/tenants/{tenant:str}/networks"
    tags = ("networks",)

    @get(summary="List a tenant's networks", permission="network.read")
    async def list_networks(self, plane: Plane, tenant: TenantName, labelled: Paged) -> list[NetworkView]:
        views = await plane.networks.list(tenant)
        return labelled.of(views, lambda view: view.network.name, labels=lambda view: view.network.labels)

    @post(summary="Create a network", permission="network.write")
    async def create_network(self, plane: Plane, tenant: TenantName, data: JSONBody[NetworkSpec]) -> NetworkView:
        note(name=data.name)
        return await plane.networks.create(
            tenant,
            data.name,
            subnet=data.subnet,
            subnet6=data.subnet6,
            mtu=data.mtu,
            outbound=data.outbound,
            labels=data.labels,
        )

    @get("/{network:str}", summary="Show a network and its measured state", permission="network.read")
    async def get_network(self, plane: Plane, tenant: TenantName, network: Name) -> NetworkView:
        return await plane.networks.get(tenant, network)

    @patch("/{network:str}", summary="Change a network's way out", permission="network.write")
    async def update_network(
        self, plane: Plane, tenant: TenantName, network: Name, data: JSONBody[NetworkPatch]
    ) -> NetworkView:
        return await plane.networks.update(tenant, network, data)

    @delete(
        "/{network:str}",
        summary="Remove a network that no instance is on and no router joins",
        permission="network.write",
    )
    async def remove_network(self, plane: Plane, tenant: TenantName, network: Name) -> None:
        await plane.networks.remove(tenant, network)
