"""/v1/tenants/{tenant}/endpoints: addresses in a tenant's own network that lead to another tenant's instances."""

from __future__ import annotations

from litestar import Controller, delete, get, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.pages import Paged
from insula.api.parameters import Name, Plane, TenantName
from insula.model.service_endpoints import ServiceEndpoint, ServiceEndpointSpec


class ServiceEndpointRoutes(Controller):
    path = "/tenants/{tenant:str}/endpoints"
    tags = ("peerings",)

    @get(summary="List a tenant's service endpoints", permission="network.read")
    async def list_endpoints(self, plane: Plane, tenant: TenantName, labelled: Paged) -> list[ServiceEndpoint]:
        return labelled.of(await plane.endpoints.list(tenant), lambda endpoint: endpoint.name)

    @post(summary="Create an address that is one port of a peer's instance", permission="network.write")
    async def create_endpoint(
        self, plane: Plane, tenant: TenantName, data: JSONBody[ServiceEndpointSpec]
    ) -> ServiceEndpoint:
        note(name=data.name, peer=data.peer)
        return await plane.endpoints.create(tenant, data)

    @get("/{endpoint:str}", summary="Show a service endpoint", permission="network.read")
    async def get_endpoint(self, plane: Plane, tenant: TenantName, endpoint: Name) -> ServiceEndpoint:
        return await plane.endpoints.get(tenant, endpoint)

    @delete("/{endpoint:str}", summary="Remove a service endpoint", permission="network.write")
    async def remove_endpoint(self, plane: Plane, tenant: TenantName, endpoint: Name) -> None:
        await plane.endpoints.remove(tenant, endpoint)
