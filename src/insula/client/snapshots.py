"""`SnapshotsResource`: /v1/tenants/{tenant}/instances/{name}/snapshots."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]  # inside the class below, `list` is a method


class SnapshotsResource:
    """Snapshots of instances, and copies of those that run."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def create(self, tenant: str, instance: str, name: str = "", *, memory: bool = False) -> Object:
        """Make a snapshot of the disk, with `memory` of disk and memory at one moment."""
        return self._call("POST", tenant, instance, "snapshots", body={"name": name, "memory": memory})  # type: ignore[no-any-return]

    def list(self, tenant: str, instance: str) -> Objects:
        return self._call("GET", tenant, instance, "snapshots")  # type: ignore[no-any-return]

    def get(self, tenant: str, instance: str, name: str) -> Object:
        return self._call("GET", tenant, instance, "snapshots", name)  # type: ignore[no-any-return]

    def restore(self, tenant: str, instance: str, name: str) -> Object:
        """Have the instance go back to a snapshot; returns the instance."""
        return self._call("POST", tenant, instance, "snapshots", name, "restore")  # type: ignore[no-any-return]

    def remove(self, tenant: str, instance: str, name: str) -> None:
        self._call("DELETE", tenant, instance, "snapshots", name)

    def fork(self, tenant: str, instance: str, count: int = 1) -> Objects:
        """Make copies of an instance that runs, with its memory; returns them."""
        return self._call("POST", tenant, instance, "fork", body={"count": count})  # type: ignore[no-any-return]

    def _call(self, method: str, tenant: str, instance: str, *rest: str, body: object = None) -> Any:
        return self.client.call(method, "tenants", tenant, "instances", instance, *rest, body=body)
