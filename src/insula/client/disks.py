"""`DisksResource`: further disks of virtual machines."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]


class DisksResource:
    """Further disks of virtual machines."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def add(self, tenant: str, instance: str, name: str, size: int, mount: str | None = None) -> Object:
        """Give an instance one more disk, of `size` bytes, mounted if that is asked for. Return the instance."""
        body = {"name": name, "size": size, "mount": mount}
        return self.client.call("POST", "tenants", tenant, "instances", instance, "disks", body=body)  # type: ignore[no-any-return]

    def remove(self, tenant: str, instance: str, disk: str) -> None:
        """Remove a disk, with what is on it."""
        self.client.call("DELETE", "tenants", tenant, "instances", instance, "disks", disk)
