"""/v1/tenants/{tenant}/networks: a tenant's private networks."""

from __future__ import annotations

from litestar import Controller, delete, get, post
from litestar.params import JSONBody

from insula.api.parameters import Name, TheCloud
from insula.model.views import NetworkSpec, NetworkView


class NetworkController(Controller):
    path = "/tenants/{tenant:str}/networks"
    tags = ("networks",)

    @get(summary="List a tenant's networks")
    async def list_networks(self, cloud: TheCloud, tenant: Name) -> list[NetworkView]:
        return await cloud.networks.list(tenant)

    @post(summary="Create a network")
    async def create_network(self, cloud: TheCloud, tenant: Name, data: JSONBody[NetworkSpec]) -> NetworkView:
        return await cloud.networks.create(
            tenant, data.name, subnet=data.subnet, subnet6=data.subnet6, mtu=data.mtu, labels=data.labels
        )

    @get("/{network:str}", summary="Show a network and its measured state")
    async def get_network(self, cloud: TheCloud, tenant: Name, network: Name) -> NetworkView:
        return await cloud.networks.get(tenant, network)

    @delete("/{network:str}", summary="Remove a network that no instance is on")
    async def remove_network(self, cloud: TheCloud, tenant: Name, network: Name) -> None:
        await cloud.networks.remove(tenant, network)
