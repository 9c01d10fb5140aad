"""`PoliciesResource`, `AddressGroupsResource` and `OperatorPoliciesResource`."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]  # inside the classes below, `list` is a method


class PoliciesResource:
    """Policies, which say what instances may receive and send."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def create(
        self,
        tenant: str,
        name: str,
        select: Mapping[str, object],
        directions: Sequence[str],
        rules: Sequence[Mapping[str, object]] = (),
        **other: object,
    ) -> Object:
        """Create a policy; it is in force when this returns. `other` is audit, dns and labels."""
        body = {"name": name, "select": {**select}, "directions": [*directions], "rules": [*rules], **other}
        return self.client.call("POST", "tenants", tenant, "policies", body=body)  # type: ignore[no-any-return]

    def list(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "policies")  # type: ignore[no-any-return]

    def get(self, tenant: str, name: str) -> Object:
        return self.client.call("GET", "tenants", tenant, "policies", name)  # type: ignore[no-any-return]

    def effective(self, tenant: str, instance: str) -> Object:
        """Return all that applies to an instance, and why."""
        return self.client.call("GET", "tenants", tenant, "effective-policies", instance)  # type: ignore[no-any-return]

    def update(self, tenant: str, name: str, **changes: object) -> Object:
        """Change a policy, all or nothing: select, directions, rules, add_rules, remove_rules, audit, dns."""
        return self.client.call("PATCH", "tenants", tenant, "policies", name, body=changes)  # type: ignore[no-any-return]

    def remove(self, tenant: str, name: str) -> None:
        self.client.call("DELETE", "tenants", tenant, "policies", name)


class AddressGroupsResource:
    """Address groups: ranges under one name, for the rules of policies."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def create(self, tenant: str, name: str, cidrs: Sequence[str]) -> Object:
        body = {"name": name, "cidrs": [*cidrs]}
        return self.client.call("POST", "tenants", tenant, "address-groups", body=body)  # type: ignore[no-any-return]

    def list(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "address-groups")  # type: ignore[no-any-return]

    def get(self, tenant: str, name: str) -> Object:
        return self.client.call("GET", "tenants", tenant, "address-groups", name)  # type: ignore[no-any-return]

    def update(self, tenant: str, name: str, **changes: object) -> Object:
        """Change the ranges, all or nothing: cidrs replaces all, add and remove change some."""
        where = ("tenants", tenant, "address-groups", name)
        return self.client.call("PATCH", *where, body=changes)  # type: ignore[no-any-return]

    def remove(self, tenant: str, name: str) -> None:
        """Remove a group. Conflict while a policy uses it."""
        self.client.call("DELETE", "tenants", tenant, "address-groups", name)


class OperatorPoliciesResource:
    """Policies of the operator, above those of the tenants."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def create(
        self, name: str, rules: Sequence[Mapping[str, object]], tenants: Mapping[str, object], priority: int = 1000
    ) -> Object:
        """Create a policy for the tenants that a selector selects. The first rule that matches decides."""
        body = {"name": name, "rules": [*rules], "tenants": {**tenants}, "priority": priority}
        return self.client.call("POST", "operator-policies", body=body)  # type: ignore[no-any-return]

    def update(self, name: str, **changes: object) -> Object:
        """Change `rules`, `tenants`, `priority` or `labels`; what is not given stays."""
        return self.client.call("PATCH", "operator-policies", name, body=changes)  # type: ignore[no-any-return]

    def list(self) -> Objects:
        return self.client.call("GET", "operator-policies")  # type: ignore[no-any-return]

    def get(self, name: str) -> Object:
        return self.client.call("GET", "operator-policies", name)  # type: ignore[no-any-return]

    def remove(self, name: str) -> None:
        self.client.call("DELETE", "operator-policies", name)
