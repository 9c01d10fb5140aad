"""`ServiceEndpointsResource`: /v1/tenants/{tenant}/endpoints."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]  # inside the class below, `list` is a method


class ServiceEndpointsResource:
    """Addresses in a tenant's own network that lead to another tenant's instances."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def create(self, tenant: str, name: str, network: str, **to: object) -> Object:
        """Create an endpoint on a network; `to` is peer, instance, protocol, port, peering, address and address6."""
        body = {"name": name, "network": network, **to}
        return self.client.call("POST", "tenants", tenant, "endpoints", body=body)  # type: ignore[no-any-return]

    def list(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "endpoints")  # type: ignore[no-any-return]

    def get(self, tenant: str, name: str) -> Object:
        return self.client.call("GET", "tenants", tenant, "endpoints", name)  # type: ignore[no-any-return]

    def remove(self, tenant: str, name: str) -> None:
        self.client.call("DELETE", "tenants", tenant, "endpoints", name)
