"""`AsyncSnapshotOperations`: /v1/tenants/{tenant}/instances/{name}/snapshots."""

from __future__ import annotations

from collections.abc import AsyncIterator

from insula.model.snapshots import SnapshotSpec, SnapshotView
from insula.sdk import answers
from insula.sdk._async.calls import AsyncCaller
from insula.sdk.types import AnyInstance


class AsyncSnapshotOperations:
    """Snapshots of instances: of their disk, or of disk and memory at one moment."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    def list(
        self, tenant: str, instance: str, *, prefix: str | None = None, page: int | None = None
    ) -> AsyncIterator[SnapshotView]:
        """Yield the snapshots of an instance: those whose names begin with `prefix`."""
        return self._caller.pages(answers.SNAPSHOTS, *_path(tenant, instance), query={"prefix": prefix}, page=page)

    async def create(
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
        return await self._caller.change(
            answers.SNAPSHOT, "POST", *_path(tenant, instance), body=spec, key=idempotency_key
        )

    async def get(self, tenant: str, instance: str, snapshot: str) -> SnapshotView:
        return await self._caller.get(answers.SNAPSHOT, *_path(tenant, instance), snapshot)

    async def restore(
        self, tenant: str, instance: str, snapshot: str, *, idempotency_key: str | None = None
    ) -> AnyInstance:
        """Have the instance go back to a snapshot: what it has on its disk is lost. With memory it goes on."""
        where = (*_path(tenant, instance), snapshot, "restore")
        return await self._caller.change(answers.INSTANCE, "POST", *where, key=idempotency_key)

    async def remove(self, tenant: str, instance: str, snapshot: str, *, idempotency_key: str | None = None) -> None:
        await self._caller.do("DELETE", *_path(tenant, instance), snapshot, key=idempotency_key)


def _path(tenant: str, instance: str) -> tuple[str, ...]:
    return ("tenants", tenant, "instances", instance, "snapshots")
