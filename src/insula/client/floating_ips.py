"""`FloatingIpsResource`: /v1/tenants/{tenant}/floating-ips."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]  # inside the class below, `list` is a method


class FloatingIpsResource:
    """Floating addresses, which lead from outside to a tenant's instances."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def allocate(self, tenant: str, name: str = "", **spec: object) -> Object:
        """Allocate a floating address: its `address` or `family`, and the `instance` and `network` to attach it to."""
        return self.client.call("POST", "tenants", tenant, "floating-ips", body={"name": name, **spec})  # type: ignore[no-any-return]

    def list(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "floating-ips")  # type: ignore[no-any-return]

    def get(self, tenant: str, name: str) -> Object:
        return self.client.call("GET", "tenants", tenant, "floating-ips", name)  # type: ignore[no-any-return]

    def update(self, tenant: str, name: str, instance: str | None, network: str | None = None) -> Object:
        """Attach it to an instance, by its port on a network; without an instance it is detached."""
        body = {"instance": instance, "network": network}
        return self.client.call("PATCH", "tenants", tenant, "floating-ips", name, body=body)  # type: ignore[no-any-return]

    def release(self, tenant: str, name: str) -> None:
        self.client.call("DELETE", "tenants", tenant, "floating-ips", name)
