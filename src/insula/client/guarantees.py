"""`client.guarantees`: /v1/tenants/{tenant}/guarantee and /guarantees."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]  # inside the class below, `list` is a method


class GuaranteesResource:
    """Floors and ceilings of a tenant as a whole (`instance` is None) and of its instances."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def list(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "guarantees")  # type: ignore[no-any-return]

    def get(self, tenant: str, instance: str | None = None) -> Object:
        return self.client.call("GET", "tenants", tenant, *_which(instance))  # type: ignore[no-any-return]

    def set(self, tenant: str, instance: str | None = None, **values: float | int | None) -> Object:
        """Change a guarantee: floor_out, floor_in, ceiling_out, ceiling_in (bit/s), packets_out, packets_in (of
        instances), cpus, memory (bytes). Others stay, and None is no floor or ceiling."""
        return self.client.call("PATCH", "tenants", tenant, *_which(instance), body=values)  # type: ignore[no-any-return]

    def clear(self, tenant: str, instance: str | None = None) -> None:
        self.client.call("DELETE", "tenants", tenant, *_which(instance))


def _which(instance: str | None) -> tuple[str, ...]:
    return ("guarantee",) if instance is None else ("guarantees", instance)
