"""/v1/tenants/{tenant}/instances/{name}/snapshots: snapshots of an instance, and copies of one that runs."""

from __future__ import annotations

from collections.abc import Sequence

from litestar import Controller, delete, get, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.pages import Paged
from insula.api.parameters import Name, Plane, Sender, TenantName
from insula.model.snapshots import ForkSpec, SnapshotSpec, SnapshotView
from insula.model.views import InstanceView


class SnapshotRoutes(Controller):
    path = "/tenants/{tenant:str}/instances/{name:str}"
    tags = ("instances",)

    @get("/snapshots", summary="List the snapshots of an instance", permission="instance.read")
    async def list_snapshots(self, plane: Plane, tenant: TenantName, name: Name, page: Paged) -> list[SnapshotView]:
        return page.of(await plane.snapshots.list(tenant, name), lambda snapshot: snapshot.name)

    @post(
        "/snapshots",
        summary="Make a snapshot of its disk; with `memory` of disk and memory at one moment, while it runs",
        permission="instance.write",
    )
    async def create_snapshot(
        self, plane: Plane, tenant: TenantName, name: Name, data: JSONBody[SnapshotSpec]
    ) -> SnapshotView:
        note(snapshot=data.name, memory=data.memory)
        made = await plane.snapshots.create(tenant, name, data)
        note(snapshot=made.name)
        return made

    @get("/snapshots/{snapshot:str}", summary="Show a snapshot", permission="instance.read")
    async def get_snapshot(self, plane: Plane, tenant: TenantName, name: Name, snapshot: Name) -> SnapshotView:
        return await plane.snapshots.get(tenant, name, snapshot)

    @delete("/snapshots/{snapshot:str}", summary="Remove a snapshot", permission="instance.write")
    async def remove_snapshot(self, plane: Plane, tenant: TenantName, name: Name, snapshot: Name) -> None:
        note(snapshot=snapshot)
        await plane.snapshots.remove(tenant, name, snapshot)

    @post(
        "/snapshots/{snapshot:str}/restore",
        status_code=200,
        summary="Have the instance go back to a snapshot: what it has now is lost",
        permission="instance.write",
    )
    async def restore_snapshot(
        self, plane: Plane, tenant: TenantName, name: Name, snapshot: Name, sender: Sender
    ) -> InstanceView:
        note(snapshot=snapshot)
        return await plane.snapshots.restore(tenant, name, snapshot, by=sender)

    @post(
        "/fork",
        status_code=200,
        summary="Make copies of it while it runs, each with a name, addresses and an identity of its own",
        permission="instance.write",
    )
    async def fork(
        self, plane: Plane, tenant: TenantName, name: Name, data: JSONBody[ForkSpec], sender: Sender
    ) -> Sequence[InstanceView]:
        note(count=data.count)
        return await plane.forking.fork(tenant, name, data, by=sender)
