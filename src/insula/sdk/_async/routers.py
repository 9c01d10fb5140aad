"""`AsyncRouterOperations`: /v1/tenants/{tenant}/routers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from insula.model.routers import RouterPatch, RouterSpec, RouterView, StaticRoute
from insula.sdk import answers
from insula.sdk._async.calls import AsyncCaller


class AsyncRouterOperations:
    """A tenant's routers, which join its networks."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    def list(
        self, tenant: str, *, prefix: str | None = None, labels: Sequence[str] = (), page: int | None = None
    ) -> AsyncIterator[RouterView]:
        """Yield the routers of a tenant: those whose names begin with `prefix`, and that have all `labels`."""
        query = {"prefix": prefix, "label": [*labels]}
        return self._caller.pages(answers.ROUTERS, "tenants", tenant, "routers", query=query, page=page)

    async def create(
        self,
        tenant: str,
        name: str,
        networks: Sequence[str] = (),
        *,
        routes: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> RouterView:
        """Create a router between networks. `routes` has the next hop of each destination in CIDR notation."""
        spec = RouterSpec(name=name, networks=[*networks], routes=_routes(routes), labels=dict(labels or {}))
        return await self._caller.change(
            answers.ROUTER, "POST", "tenants", tenant, "routers", body=spec, key=idempotency_key
        )

    async def get(self, tenant: str, router: str) -> RouterView:
        return await self._caller.get(answers.ROUTER, "tenants", tenant, "routers", router)

    async def update(
        self,
        tenant: str,
        router: str,
        *,
        join: Sequence[str] = (),
        leave: Sequence[str] = (),
        add_routes: Mapping[str, str] | None = None,
        remove_routes: Sequence[str] = (),
        idempotency_key: str | None = None,
    ) -> RouterView:
        """Join and leave networks, add and remove routes: all or nothing."""
        patch = RouterPatch(
            join=[*join], leave=[*leave], add_routes=_routes(add_routes), remove_routes=[*remove_routes]
        )
        return await self._caller.change(
            answers.ROUTER, "PATCH", "tenants", tenant, "routers", router, body=patch, key=idempotency_key
        )

    async def remove(self, tenant: str, router: str, *, idempotency_key: str | None = None) -> None:
        """Remove a router. Open connections between its networks are cut."""
        await self._caller.do("DELETE", "tenants", tenant, "routers", router, key=idempotency_key)


def _routes(routes: Mapping[str, str] | None) -> list[StaticRoute]:
    return [StaticRoute(destination=each, next_hop=hop) for each, hop in (routes or {}).items()]
