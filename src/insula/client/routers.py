"""`RoutersResource`: /v1/tenants/{tenant}/routers."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]  # inside the class below, `list` is a method


class RoutersResource:
    """Routers, which join a tenant's networks."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def create(
        self,
        tenant: str,
        name: str,
        networks: Sequence[str] = (),
        routes: Sequence[Mapping[str, str]] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Object:
        """Create a router between networks. A route has a `destination` and a `next_hop`."""
        body = {"name": name, "networks": [*networks], "routes": [*routes], "labels": {**(labels or {})}}
        return self.client.call("POST", "tenants", tenant, "routers", body=body)  # type: ignore[no-any-return]

    def list(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "routers")  # type: ignore[no-any-return]

    def get(self, tenant: str, name: str) -> Object:
        return self.client.call("GET", "tenants", tenant, "routers", name)  # type: ignore[no-any-return]

    def update(self, tenant: str, name: str, **changes: object) -> Object:
        """Change a router: `join`, `leave`, `add_routes`, `remove_routes`, all or nothing."""
        return self.client.call("PATCH", "tenants", tenant, "routers", name, body=changes)  # type: ignore[no-any-return]

    def remove(self, tenant: str, name: str) -> None:
        self.client.call("DELETE", "tenants", tenant, "routers", name)
