"""`MigrationsResource`: moves of instances between hosts."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]


class MigrationsResource:
    """Moves of instances between hosts, of which a client knows both."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def ticket(self, tenant: str) -> Object:
        """Ask this host for a ticket, by which another one may send it an instance."""
        return self.client.call("POST", "tenants", tenant, "migrations")  # type: ignore[no-any-return]

    def migrate(self, tenant: str, instance: str, target: Object) -> None:
        """Move an instance from this host; `target` has the `addresses` of another one, and `authority` and `secret` of
        its ticket."""
        self.client.call("POST", "tenants", tenant, "instances", instance, "migrate", body=target)
