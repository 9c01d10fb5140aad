"""`client.networks`: /v1/tenants/{tenant}/networks."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]  # inside the class below, `list` is a method


class NetworksResource:
    """A tenant's private networks."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def create(self, tenant: str, name: str, subnet: str, subnet6: str | None = None, **other: object) -> Object:
        """Create a network with the addresses of `subnet`; `other` is mtu, outbound and labels."""
        body = {"name": name, "subnet": subnet, "subnet6": subnet6, **other}
        return self.client.call("POST", "tenants", tenant, "networks", body=body)  # type: ignore[no-any-return]

    def list(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "networks")  # type: ignore[no-any-return]

    def get(self, tenant: str, name: str) -> Object:
        return self.client.call("GET", "tenants", tenant, "networks", name)  # type: ignore[no-any-return]

    def update(self, tenant: str, name: str, **changes: object) -> Object:
        """Change a network's `outbound`."""
        return self.client.call("PATCH", "tenants", tenant, "networks", name, body=changes)  # type: ignore[no-any-return]

    def remove(self, tenant: str, name: str) -> None:
        self.client.call("DELETE", "tenants", tenant, "networks", name)

    def trace(self, tenant: str, source: str, target: str, service: str, **query: object) -> Object:
        """Tell whether `source` reaches `target`, and why; `query` is rules and live."""
        asked = {"source": source, "target": target, "service": service, **query}
        return self.client.call("GET", "tenants", tenant, "trace", query=asked)  # type: ignore[no-any-return]
