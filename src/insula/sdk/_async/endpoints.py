"""`AsyncServiceEndpointOperations`: /v1/tenants/{tenant}/endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal

from insula.model.peerings import DEFAULT_NAME
from insula.model.service_endpoints import ServiceEndpoint, ServiceEndpointSpec
from insula.sdk import answers
from insula.sdk._async.calls import AsyncCaller


class AsyncServiceEndpointOperations:
    """Addresses in a tenant's own network, each of which is one port of another tenant's instance."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    def list(
        self, tenant: str, *, prefix: str | None = None, page: int | None = None
    ) -> AsyncIterator[ServiceEndpoint]:
        """Yield the endpoints of a tenant: those whose names begin with `prefix`."""
        return self._caller.pages(
            answers.ENDPOINTS, "tenants", tenant, "endpoints", query={"prefix": prefix}, page=page
        )

    async def create(
        self,
        tenant: str,
        name: str,
        network: str,
        peer: str,
        instance: str,
        to_port: int,
        *,
        protocol: Literal["tcp", "udp"] = "tcp",
        peering: str = DEFAULT_NAME,
        address: str | None = None,
        address6: str | None = None,
        idempotency_key: str | None = None,
    ) -> ServiceEndpoint:
        """Create an endpoint on a network, which leads to the port `to_port` of an instance of the tenant `peer`."""
        spec = ServiceEndpointSpec(
            name=name,
            network=network,
            peer=peer,
            peering=peering,
            instance=instance,
            protocol=protocol,
            port=to_port,
            address=address,
            address6=address6,
        )
        return await self._caller.change(
            answers.ENDPOINT, "POST", "tenants", tenant, "endpoints", body=spec, key=idempotency_key
        )

    async def get(self, tenant: str, endpoint: str) -> ServiceEndpoint:
        return await self._caller.get(answers.ENDPOINT, "tenants", tenant, "endpoints", endpoint)

    async def remove(self, tenant: str, endpoint: str, *, idempotency_key: str | None = None) -> None:
        """Remove an endpoint. Open connections through it are cut."""
        await self._caller.do("DELETE", "tenants", tenant, "endpoints", endpoint, key=idempotency_key)
