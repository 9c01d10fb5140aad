"""`Snapshots`: the verbs of snapshots. A snapshot is a record in the store and files in its instance's directory.

The record comes first, as "creating", with the space that the files may take: so nothing is written that the tenant's
quota has no room for. It becomes "ready" when the files are complete and durable. What a crash leaves behind is a
record that is still "creating", and files without a record that is ready; both are removed when the daemon starts
(`sweep`).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Coroutine, Sequence
from itertools import count
from typing import Any, TypeVar

import msgspec

from insula.control.accounting.ledger import ledger_with
from insula.control.allocation.quotas import add, change, of_snapshots, subtract
from insula.control.allocation.transaction import guard, retried, turn
from insula.control.disk import check_room
from insula.control.identities.admission import admit
from insula.control.identities.authority import Authority
from insula.control.instances.checks import check_running, check_there, no_instance
from insula.control.instances.drivers.base import snapshots_of
from insula.control.instances.drivers.snapshots import SnapshotFiles, Taken
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.specs import cli_command
from insula.control.instances.verbs import Instances
from insula.control.keys import INSTANCES, SNAPSHOTS, TENANTS, USAGE
from insula.control.tasks import Tasks
from insula.control.workers import Locks
from insula.model import rules
from insula.model.errors import Conflict, Failed, NotFound
from insula.model.objects import Instance
from insula.model.snapshots import InstanceSnapshot, SnapshotSpec, SnapshotView
from insula.model.units import check_label
from insula.model.views import InstanceView
from insula.store.typed import Found

T = TypeVar("T")


class Snapshots:
    def __init__(self, instances: Instances, tasks: Tasks) -> None:
        self.context = instances.context
        self.instances = instances
        self.locks = Locks()
        """By the instance's ID: one change of an instance's snapshots at a time."""
        self._tasks = tasks

    async def whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work to its end, also if the client disconnects."""
        return await asyncio.shield(self._tasks.spawn(work))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do the work beside requests, until the daemon ends."""
        return self._tasks.spawn(work)

    def files(self, managed: ManagedInstance) -> SnapshotFiles:
        """The snapshots of the instance's driver. Conflict if it has none."""
        return snapshots_of(self.context.driver(managed.instance))

    # -- reading ---------------------------------------------------------------------------------------------------

    async def list(self, tenant: str, name: str) -> Sequence[SnapshotView]:
        """The snapshots of an instance, by name. NotFound."""
        instance = (await self.instances.get(tenant, name)).instance
        found = await SNAPSHOTS.readable(self.context.store, tenant, instance.id)
        return [_view(snapshot, instance) for snapshot in found]

    async def get(self, tenant: str, name: str, snapshot: str) -> SnapshotView:
        instance = (await self.instances.get(tenant, name)).instance
        return _view((await self._find(instance, snapshot)).value, instance)

    async def _find(self, instance: Instance, name: str) -> Found[InstanceSnapshot]:
        found = await SNAPSHOTS.get(self.context.store, instance.tenant, instance.id, check_label("snapshot", name))
        if found is None:
            there = cli_command(instance.tenant, f"snapshot ls {instance.name}")
            raise NotFound(f"instance {instance.name} has no snapshot {name}", f"{there} lists them")
        return found

    # -- making ----------------------------------------------------------------------------------------------------

    async def create(self, tenant: str, name: str, spec: SnapshotSpec) -> SnapshotView:
        """Make a snapshot of an instance's disk, also while it runs; with `memory`, of one that runs, of both at one
        moment. Conflict, QuotaExceeded, Failed; after an error there is none."""
        return await self.whole(self._create(tenant, name, spec))

    async def _create(self, tenant: str, name: str, spec: SnapshotSpec) -> SnapshotView:
        self.context.refuse_if_going_down()
        managed = await self.instances.find(tenant, name)
        files = self.files(managed)
        check_room(self.context)
        async with self.locks[managed.instance.id]:
            check_there(managed)
            running = managed.status.state == "running"
            if spec.memory or managed.status.state in ("starting", "stopping"):
                check_running(managed)
            most = await files.most(managed.instance, memory=spec.memory)
            begun = await self._begin(managed, spec, most)
            try:
                taken = await self._take(managed, files, begun, running=running)
                return _view(await self._finish(begun, taken), managed.instance)
            except BaseException:
                await self._drop(begun, files)
                raise

    async def _take(
        self, managed: ManagedInstance, files: SnapshotFiles, snapshot: InstanceSnapshot, *, running: bool
    ) -> Taken:
        instance, memory = managed.instance, snapshot.memory
        if running:
            return await files.take(instance, snapshot.id, memory=memory, running=True)
        async with managed.lock:  # it can't be started, or go on, meanwhile
            if managed.status.state in ("starting", "running", "stopping"):
                raise Conflict(f"instance {instance.name} was started meanwhile", "try again")
            return await files.take(instance, snapshot.id, memory=memory, running=False)

    async def _begin(self, managed: ManagedInstance, spec: SnapshotSpec, most: int) -> InstanceSnapshot:
        """Commit the record of a snapshot that is to be made. Conflict, QuotaExceeded, NotFound."""
        store, tenant = self.context.store, managed.instance.tenant
        if spec.name:
            check_label("snapshot", spec.name)

        async def attempt() -> InstanceSnapshot:
            usage, owner = await guard(store, tenant), await TENANTS.get(store, tenant)
            instance = await INSTANCES.get(store, tenant, managed.instance.name)
            if owner is None or instance is None or instance.value.id != managed.instance.id:
                raise no_instance(tenant, managed.instance.name)
            there = {each.name for each in await SNAPSHOTS.readable(store, tenant, managed.instance.id)}
            snapshot = InstanceSnapshot(
                tenant=tenant,
                instance=managed.instance.id,
                name=_free_name(spec.name, there, managed.instance),
                id=secrets.token_hex(16),
                memory=spec.memory,
                size=most,
                created=time.time(),
            )
            after = add(owner.value, usage.value, of_snapshots([snapshot]))
            key = (tenant, snapshot.instance, snapshot.name)
            await store.transact(
                [
                    USAGE.unchanged(usage, tenant),
                    TENANTS.unchanged(owner, tenant),
                    INSTANCES.unchanged(instance, tenant, instance.value.name),
                    SNAPSHOTS.absent(*key),
                ],
                [SNAPSHOTS.put(snapshot, *key), USAGE.put(after, tenant), await ledger_with(store, tenant, after)],
            )
            return snapshot

        async with turn(store, tenant):
            return await retried(attempt)

    async def _finish(self, begun: InstanceSnapshot, taken: Taken) -> InstanceSnapshot:
        """Commit that a snapshot is ready, and what it takes. NotFound if its instance was removed; QuotaExceeded."""
        store, tenant, key = self.context.store, begun.tenant, (begun.tenant, begun.instance, begun.name)
        ready = msgspec.structs.replace(begun, state="ready", size=taken.size, stopped=round(taken.stopped, 6))

        async def attempt() -> InstanceSnapshot:
            usage, owner = await guard(store, tenant), await TENANTS.get(store, tenant)
            found = await SNAPSHOTS.get(store, *key)
            if owner is None or found is None or found.value.id != begun.id:
                raise NotFound("the instance was removed meanwhile")
            after = change(owner.value, usage.value, of_snapshots([begun]), of_snapshots([ready]))
            await store.transact(
                [USAGE.unchanged(usage, tenant), SNAPSHOTS.unchanged(found, *key)],
                [SNAPSHOTS.put(ready, *key), USAGE.put(after, tenant), await ledger_with(store, tenant, after)],
            )
            return ready

        async with turn(store, tenant):
            return await retried(attempt)

    # -- removing --------------------------------------------------------------------------------------------------

    async def remove(self, tenant: str, name: str, snapshot: str) -> None:
        """Remove a snapshot. NotFound."""
        await self.whole(self._remove(tenant, name, snapshot))

    async def _remove(self, tenant: str, name: str, snapshot: str) -> None:
        managed = await self.instances.find(tenant, name)
        files = self.files(managed)
        async with self.locks[managed.instance.id]:
            await self._drop((await self._find(managed.instance, snapshot)).value, files)

    async def _drop(self, snapshot: InstanceSnapshot, files: SnapshotFiles) -> None:
        """Delete the record of a snapshot, and then its files. If the daemon dies in between, the next one removes
        these."""
        store, tenant, key = self.context.store, snapshot.tenant, (snapshot.tenant, snapshot.instance, snapshot.name)

        async def attempt() -> None:
            usage, found = await guard(store, tenant), await SNAPSHOTS.get(store, *key)
            if found is None or found.value.id != snapshot.id:
                return
            after = subtract(usage.value, of_snapshots([found.value]))
            await store.transact(
                [USAGE.unchanged(usage, tenant), SNAPSHOTS.unchanged(found, *key)],
                [SNAPSHOTS.delete(*key), USAGE.put(after, tenant), await ledger_with(store, tenant, after)],
            )

        async with turn(store, tenant):
            await retried(attempt)
        try:
            await files.remove(snapshot.instance, snapshot.id)
        except OSError as error:
            raise Failed(f"the files of snapshot {snapshot.name} can't be removed: {error}") from error

    async def sweep(self) -> None:
        """Remove what is left of snapshots that were being made, or removed, when an earlier daemon ended. InsulaError,
        OSError."""
        store = self.context.store
        for managed in self.instances.managed.all():
            files, instance = self.context.driver(managed.instance).snapshots, managed.instance
            if files is None:
                continue
            async with self.locks[instance.id]:
                found = await SNAPSHOTS.list(store, instance.tenant, instance.id)
                for snapshot in found:
                    if snapshot.state == "creating":
                        await self._drop(snapshot, files)
                await files.sweep(instance.id, {each.id for each in found if each.state == "ready"})

    # -- restoring -------------------------------------------------------------------------------------------------

    async def restore(self, tenant: str, name: str, snapshot: str, *, by: Authority) -> InstanceView:
        """Have an instance go back to a snapshot: what it has on its disk is lost. One that runs is ended, and started
        again; with memory it is started in any case, and goes on. Conflict if it is not as it was then; NotFound."""
        return await self.whole(self._restore(tenant, name, snapshot, by))

    async def _restore(self, tenant: str, name: str, snapshot: str, by: Authority) -> InstanceView:
        self.context.refuse_if_going_down()
        managed = await self.instances.find(tenant, name)
        files = self.files(managed)
        async with self.locks[managed.instance.id]:
            check_there(managed)
            found = (await self._find(managed.instance, snapshot)).value
            admit(by, tenant, managed.instance.spec)
            check_room(self.context)
            await files.check(managed.instance, found.id)
            if started := managed.active:
                await self._end(managed)
            async with managed.lock:
                if managed.active or managed.gone:
                    raise Conflict(f"instance {name} was started meanwhile", "stop it, and try again")
                try:
                    await files.restore(managed.instance, found.id)
                except OSError as error:
                    raise Failed(f"the snapshot can't be restored: {error.strerror}", "free some space") from error
        if started or found.memory:
            return await self.instances.start(tenant, managed.instance.name, by=by)
        return await self.instances.get(tenant, managed.instance.name)

    async def _end(self, managed: ManagedInstance) -> None:
        """End an instance whose files are of no use any more."""
        if managed.instance.spec.remove:
            what = f"instance {managed.instance.name} is removed when it ends, with its snapshots"
            raise Conflict(what, "it can't be restored")
        await self.instances.stop(managed.instance.tenant, managed.instance.name, timeout=0.0)


def _free_name(asked: str, there: set[str], instance: Instance) -> str:
    """The name of a new snapshot. Conflict if it is taken, or if there are too many."""
    if len(there) >= rules.MAX_SNAPSHOTS:
        raise Conflict(f"instance {instance.name} has {len(there)} snapshots", "remove some of them")
    if asked in there:
        raise Conflict(f"instance {instance.name} has a snapshot {asked} already", "choose another name")
    return asked or next(name for number in count(1) if (name := f"snap{number}") not in there)


def _view(snapshot: InstanceSnapshot, instance: Instance) -> SnapshotView:
    return SnapshotView(
        tenant=snapshot.tenant,
        instance=instance.name,
        name=snapshot.name,
        memory=snapshot.memory,
        state=snapshot.state,
        size=snapshot.size,
        stopped=snapshot.stopped,
        created=snapshot.created,
    )
