"""`PeeringsResource`: /v1/tenants/{tenant}/peerings."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]  # inside the class below, `list` is a method


class PeeringsResource:
    """Peerings with other tenants. A port of `allow` has a `protocol`, and `port` and `end_port` or neither."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def offer(
        self,
        tenant: str,
        to: str,
        networks: Sequence[str],
        allow: Sequence[Mapping[str, object]] | None = None,
        name: str = "peering",
    ) -> Object:
        """Offer the tenant `to` a peering with some networks. It may open all ports there, unless `allow` is given."""
        body = {"to": to, "name": name, "networks": [*networks], "allow": None if allow is None else [*allow]}
        return self.client.call("POST", "tenants", tenant, "peerings", body=body)  # type: ignore[no-any-return]

    def list(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "peerings")  # type: ignore[no-any-return]

    def get(self, tenant: str, peer: str, name: str = "peering") -> Object:
        return self.client.call("GET", "tenants", tenant, "peerings", peer, name)  # type: ignore[no-any-return]

    def accept(
        self,
        tenant: str,
        peer: str,
        networks: Sequence[str],
        allow: Sequence[Mapping[str, object]] = (),
        name: str = "peering",
    ) -> Object:
        """Accept the offer of the tenant `peer` with some networks, where it may open the ports of `allow`."""
        body = {"networks": [*networks], "allow": [*allow]}
        path = ("tenants", tenant, "peerings", peer, name, "accept")
        return self.client.call("POST", *path, body=body)  # type: ignore[no-any-return]

    def end(self, tenant: str, peer: str, name: str = "peering") -> None:
        """End a peering, or refuse or take back an offer."""
        self.client.call("DELETE", "tenants", tenant, "peerings", peer, name)
