"""`LoadBalancersResource`: /v1/tenants/{tenant}/load-balancers."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]  # inside the class below, `list` is a method


class LoadBalancersResource:
    """Load balancers, which spread connections over a tenant's instances."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def create(
        self,
        tenant: str,
        name: str,
        listen: Sequence[Mapping[str, object]],
        on: Sequence[Mapping[str, object]],
        **spec: object,
    ) -> Object:
        """Create a load balancer: its ports, its addresses, and `port`, `select`, `instances`, `affinity`, `health`."""
        body = {"name": name, "listen": [*listen], "on": [*on], **spec}
        return self.client.call("POST", "tenants", tenant, "load-balancers", body=body)  # type: ignore[no-any-return]

    def list(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "load-balancers")  # type: ignore[no-any-return]

    def get(self, tenant: str, name: str) -> Object:
        return self.client.call("GET", "tenants", tenant, "load-balancers", name)  # type: ignore[no-any-return]

    def update(self, tenant: str, name: str, **changes: object) -> Object:
        """Change `listen`, `port`, `select`, `instances`, `affinity` or `health`; what is absent stays."""
        return self.client.call("PATCH", "tenants", tenant, "load-balancers", name, body=changes)  # type: ignore[no-any-return]

    def remove(self, tenant: str, name: str) -> None:
        self.client.call("DELETE", "tenants", tenant, "load-balancers", name)
