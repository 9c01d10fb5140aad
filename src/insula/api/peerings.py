"""/v1/tenants/{tenant}/peerings: agreements of two tenants that some of their networks reach each other."""

from __future__ import annotations

from litestar import Controller, delete, get, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.pages import Paged
from insula.api.parameters import Name, Plane, TenantName
from insula.model.peerings import PeeringAcceptance, PeeringOffer, PeeringView


class PeeringRoutes(Controller):
    path = "/tenants/{tenant:str}/peerings"
    tags = ("peerings",)

    @get(summary="List a tenant's peerings, and offers by and to it", permission="peering.read")
    async def list_peerings(self, plane: Plane, tenant: TenantName, labelled: Paged) -> list[PeeringView]:
        return labelled.of(await plane.peerings.list(tenant), lambda view: view.name)

    @post(summary="Offer another tenant a peering", permission="peering.write")
    async def offer_peering(self, plane: Plane, tenant: TenantName, data: JSONBody[PeeringOffer]) -> PeeringView:
        note(name=data.name, peer=data.to, networks=data.networks)
        return await plane.peerings.offer(tenant, data)

    @get("/{peer:str}/{peering:str}", summary="Show a peering, or an offer", permission="peering.read")
    async def get_peering(self, plane: Plane, tenant: TenantName, peer: Name, peering: Name) -> PeeringView:
        return await plane.peerings.get(tenant, peer, peering)

    @post("/{peer:str}/{peering:str}/accept", summary="Accept another tenant's offer", permission="peering.write")
    async def accept_peering(
        self, plane: Plane, tenant: TenantName, peer: Name, peering: Name, data: JSONBody[PeeringAcceptance]
    ) -> PeeringView:
        note(networks=data.networks)
        return await plane.peerings.accept(tenant, peer, peering, data)

    @delete("/{peer:str}/{peering:str}", summary="End a peering, or refuse an offer", permission="peering.write")
    async def end_peering(self, plane: Plane, tenant: TenantName, peer: Name, peering: Name) -> None:
        await plane.peerings.end(tenant, peer, peering)
