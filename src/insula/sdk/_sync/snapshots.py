"""`SnapshotOperations`: /v1/tenants/{tenant}/instances/{name}/snapshots."""

from __future__ import annotations

from collections.abc import Iterator

from insula.model.snapshots import SnapshotSpec, SnapshotView
from insula.sdk import answers
from insula.sdk._sync.calls import Caller
from insula.sdk.types import AnyInstance


class SnapshotOperations:
    """Snapshots of instances: of their disk, or of disk and memory at one moment."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def list(
        self, tenant: str, instance: str, *, prefix: str | None = None, page: int | None = None
    ) -> Iterator[SnapshotView]:
        """Yield the snapshots of an instance: those whose names begin with `prefix`."""
        return self._caller.pages(answers.SNAPSHOTS, *_path(tenant, instance), query={"prefix": prefix}, page=page)

    def create(
        self,
        tenant: str,
        instance: str,
        name: str = "",
        *,
        memory: bool = False,
        idempotency_key: str | None = None,
    ) -> SnapshotView:
        """Make a snapshot of the disk, with `memory` of disk and memory at one moment. Without a name it gets one."""
        spec = SnapshotSpec(name=name, memory=memory)
        return self._caller.change(answers.SNAPSHOT, "POST", *_path(tenant, instance), body=spec, key=idempotency_key)

    def get(self, tenant: str, instance: str, snapshot: str) -> SnapshotView:
        return self._caller.get(answers.SNAPSHOT, *_path(tenant, instance), snapshot)

    def restore(self, tenant: str, instance: str, snapshot: str, *, idempotency_key: str | None = None) -> AnyInstance:
        """Have the instance go back to a snapshot: what it has on its disk is lost. With memory it goes on."""
        where = (*_path(tenant, instance), snapshot, "restore")
        return self._caller.change(answers.INSTANCE, "POST", *where, key=idempotency_key)

    def remove(self, tenant: str, instance: str, snapshot: str, *, idempotency_key: str | None = None) -> None:
        self._caller.do("DELETE", *_path(tenant, instance), snapshot, key=idempotency_key)


def _path(tenant: str, instance: str) -> tuple[str, ...]:
    return ("tenants", tenant, "instances", instance, "snapshots")
