"""`AsyncPeeringOperations`: /v1/tenants/{tenant}/peerings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from insula.model.peerings import DEFAULT_NAME, PeeringAcceptance, PeeringOffer, PeeringView
from insula.model.policies import PortMatch
from insula.sdk import answers
from insula.sdk._async.calls import AsyncCaller


class AsyncPeeringOperations:
    """A tenant's peerings with other tenants."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    def list(self, tenant: str, *, prefix: str | None = None, page: int | None = None) -> AsyncIterator[PeeringView]:
        """Yield the peerings of a tenant, and offers by and to it: those whose names begin with `prefix`."""
        return self._caller.pages(answers.PEERINGS, "tenants", tenant, "peerings", query={"prefix": prefix}, page=page)

    async def offer(
        self,
        tenant: str,
        to: str,
        networks: Sequence[str],
        *,
        allow: Sequence[PortMatch] | None = None,
        name: str = DEFAULT_NAME,
        idempotency_key: str | None = None,
    ) -> PeeringView:
        """Offer the tenant `to` a peering with some networks. It may open all ports there, unless `allow` is given."""
        spec = PeeringOffer(to=to, name=name, networks=[*networks], allow=None if allow is None else [*allow])
        return await self._caller.change(
            answers.PEERING, "POST", "tenants", tenant, "peerings", body=spec, key=idempotency_key
        )

    async def get(self, tenant: str, peer: str, peering: str = DEFAULT_NAME) -> PeeringView:
        return await self._caller.get(answers.PEERING, "tenants", tenant, "peerings", peer, peering)

    async def accept(
        self,
        tenant: str,
        peer: str,
        networks: Sequence[str],
        *,
        allow: Sequence[PortMatch] = (),
        peering: str = DEFAULT_NAME,
        idempotency_key: str | None = None,
    ) -> PeeringView:
        """Accept the offer of the tenant `peer` with some networks, where it may open the ports of `allow`."""
        spec = PeeringAcceptance(networks=[*networks], allow=[*allow])
        path = ("tenants", tenant, "peerings", peer, peering, "accept")
        return await self._caller.change(answers.PEERING, "POST", *path, body=spec, key=idempotency_key)

    async def end(
        self, tenant: str, peer: str, peering: str = DEFAULT_NAME, *, idempotency_key: str | None = None
    ) -> None:
        """End a peering, or refuse or take back an offer. Open connections are cut."""
        await self._caller.do("DELETE", "tenants", tenant, "peerings", peer, peering, key=idempotency_key)
