"""`PeeringOperations`: /v1/tenants/{tenant}/peerings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from insula.model.peerings import DEFAULT_NAME, PeeringAcceptance, PeeringOffer, PeeringView
from insula.model.policies import PortMatch
from insula.sdk import answers
from insula.sdk._sync.calls import Caller


class PeeringOperations:
    """A tenant's peerings with other tenants."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def list(self, tenant: str, *, prefix: str | None = None, page: int | None = None) -> Iterator[PeeringView]:
        """Yield the peerings of a tenant, and offers by and to it: those whose names begin with `prefix`."""
        return self._caller.pages(answers.PEERINGS, "tenants", tenant, "peerings", query={"prefix": prefix}, page=page)

    def offer(
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
        return self._caller.change(
            answers.PEERING, "POST", "tenants", tenant, "peerings", body=spec, key=idempotency_key
        )

    def get(self, tenant: str, peer: str, peering: str = DEFAULT_NAME) -> PeeringView:
        return self._caller.get(answers.PEERING, "tenants", tenant, "peerings", peer, peering)

    def accept(
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
        return self._caller.change(answers.PEERING, "POST", *path, body=spec, key=idempotency_key)

    def end(self, tenant: str, peer: str, peering: str = DEFAULT_NAME, *, idempotency_key: str | None = None) -> None:
        """End a peering, or refuse or take back an offer. Open connections are cut."""
        self._caller.do("DELETE", "tenants", tenant, "peerings", peer, peering, key=idempotency_key)
