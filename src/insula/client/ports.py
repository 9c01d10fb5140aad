"""`PortsResource`: connections of instances to networks."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]


class PortsResource:
    """Connections of instances to networks."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def plug(self, tenant: str, instance: str, network: str, **other: object) -> Object:
        """Connect an instance to one more network; `other` are fields of `NetworkAttachment`. Return the instance."""
        body = {"network": network, **other}
        return self.client.call("POST", "tenants", tenant, "instances", instance, "ports", body=body)  # type: ignore[no-any-return]

    def unplug(self, tenant: str, instance: str, port: str) -> None:
        """Disconnect an instance from a network, named by that or by the interface."""
        self.client.call("DELETE", "tenants", tenant, "instances", instance, "ports", port)
