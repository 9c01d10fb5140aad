"""The disk of instances: the driver of this host, project IDs, default limits, and the watch over free space.

The writable layer of an instance is a tree with a project ID of its own, which is a reservation in the store. It is
released when the tree is gone, not before: else the next instance would be charged for these files. Where the driver
enforces nothing, instances have no IDs.

An instance is created only while the reserve of the disk is free (`check_room`). Where limits are not enforced,
`DiskWatch` measures the instances when less is free, and stops those that are above their limit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import randbelow
from typing import Final, NamedTuple
from zlib import crc32

import msgspec

from insula.control.allocation.reservations import Reservation
from insula.control.context import Context
from insula.control.instances.managed import ManagedInstance, ManagedInstances
from insula.control.instances.recorder import Recorder
from insula.model.errors import Failed, InsulaError, Unavailable
from insula.model.objects import Instance, Limits, Resources
from insula.model.units import format_size
from insula.model.views import Check, DiskView
from insula.settings import Settings, StorageSettings
from insula.volume.drivers import open_quota
from insula.volume.measure import measured
from insula.volume.pool import Pool
from insula.volume.project import FIRST_PROJECT, PROJECTS
from insula.volume.quota import DiskLimit, DiskQuota, DiskUsage, ReservationOnly, disk_space

log = logging.getLogger("insula.control")
_CLAIM: Final = "disk-project"
_WINDOW: Final = 65536
_INTERVAL: Final = 5.0  # seconds between two looks at the free space
_AT_ONCE: Final = 4  # instances that are measured at a time
_PAUSE: Final = 60.0  # seconds between two measurements of instances
_FEW_INODES: Final = 1000
_RESERVE_PART: Final = 20
BYTES_PER_INODE: Final = 16384
"""An instance with a limit of bytes and none of inodes may have one for so many bytes, as mke2fs(8) makes them."""
DEFAULT_INODES: Final = 16384
"""The least of these."""


# -- this host ---------------------------------------------------------------------------------------------------------


def pool_of(settings: Settings) -> Pool:
    return Pool(settings.root / "pool.img", settings.root / "pool")


def open_disk(settings: Settings) -> DiskQuota:
    """The driver for the writable layers of new instances on this host. Blocks.

    A pool that exists is used even if it is not in the settings any more, because instances' files are in it. If it
    can't be used, nothing can be launched whose files are there.
    """
    pool = pool_of(settings)
    if settings.storage.pool_bytes is None and not pool.exists():
        return open_quota(settings.instances)
    try:
        pool.open(settings.storage.pool_bytes, settings.storage.format)
    except InsulaError as error:
        return ReservationOnly(pool.mount_point, error.message, trouble=str(error))
    return open_quota(pool.mount_point)


def close_pool(settings: Settings) -> None:
    """Unmount the pool, if there is one. Blocks. OSError."""
    pool_of(settings).unmount()


def examine_disk(disk: DiskQuota) -> Check:
    """The check of `insula doctor`: a write past a limit. Blocks."""
    reason, where = disk.refutation(), f"of {disk.directory}"
    if reason is None:
        return Check(name="disk quotas", state="ok", detail=f"{disk.name} {where}: a write beyond 1M was refused")
    return Check(
        name="disk quotas",
        state="missing" if disk.trouble else "degraded",
        detail=f"reservation only {where}: {reason}",
        consequence="the kernel does not enforce disk limits: those who exceed them are stopped when space is short",
        hint="set pool in [storage] of insulad.toml, or mount that file system with prjquota (docs/tenancy.md)",
    )


def shortage(disk: DiskQuota, settings: Settings) -> str | None:
    """What there is too little of for new instances; None if there is enough. OSError.

    With a pool, both file systems count: logs and records are outside of it.
    """
    found = (_shortage(each, settings.storage) for each in {disk.directory, settings.instances})
    return next(filter(None, found), None)


def _shortage(directory: Path, storage: StorageSettings) -> str | None:
    space = disk_space(directory)
    reserve = min(storage.reserve_bytes, space.size // _RESERVE_PART)
    if space.free < reserve:
        return f"{format_size(space.free)} are free at {directory}, {format_size(reserve)} are the reserve"
    if space.inodes and storage.reserve_bytes and space.free_inodes < _FEW_INODES:
        return f"{space.free_inodes} inodes are free at {directory}"
    return None


def check_room(context: Context) -> None:
    """Raise Unavailable if no instance may be created on this host for want of space."""
    disk = context.disk
    if disk.trouble:
        raise Unavailable("the disk of instances is not there", "the operator sees why with `insula status`")
    if shortage(disk, context.settings):
        raise Unavailable("no space is left for new instances", "remove instances or images")


# -- limits ------------------------------------------------------------------------------------------------------------


def with_disk_defaults(limits: Limits, resources: Resources, storage: StorageSettings) -> Resources:
    """The resources of an instance, with the limits of its disk that it needs because its tenant has such limits."""
    disk, inodes = resources.disk, resources.inodes
    if disk is None and limits.disk is not None:
        disk = min(storage.disk_bytes, limits.disk)
    if inodes is None and (disk is not None or limits.inodes is not None):
        inodes = max(DEFAULT_INODES, (disk or storage.disk_bytes) // BYTES_PER_INODE)
    return msgspec.structs.replace(resources, disk=disk, inodes=inodes)


def disk_limit(instance: Instance) -> DiskLimit:
    return DiskLimit(instance.spec.resources.disk, instance.spec.resources.inodes)


def resize_disk(disk: DiskQuota, instance: Instance, before: Resources | None) -> None:
    """Apply the limits of an instance's disk, which were `before` so far; None if that is unknown. Failed if it uses
    more than a limit that was lowered; OSError."""
    if instance.project_id is None or not disk.enforced:
        return
    limit, used = disk_limit(instance), disk.usage(instance.project_id)
    old = DiskLimit() if before is None else DiskLimit(before.disk, before.inodes)
    if used and before is not None and limit != old:
        for what, new, now in (("bytes", limit.space, used.space), ("inodes", limit.inodes, used.inodes)):
            if new is not None and now > new:
                has, asked = (format_size(now), format_size(new)) if what == "bytes" else (f"{now} inodes", f"{new}")
                raise Failed(f"instance {instance.name} has {has} on its disk, more than {asked}", "remove files in it")
    disk.limit(instance.project_id, limit)


def disk_usage(disk: DiskQuota, instance: Instance) -> DiskUsage | None:
    """What the writable layer of an instance takes; None if nothing counts it."""
    if instance.project_id is None or disk.trouble:
        return None
    with suppress(OSError):
        return disk.usage(instance.project_id)
    return None


def disk_view(disk: DiskQuota, instances: Collection[Instance], limit: Limits | Resources) -> DiskView:
    """The use of the disk by these instances together, beside a limit. What nothing counts is None."""
    found = [disk_usage(disk, instance) for instance in instances]
    counted = [usage for usage in found if usage is not None]
    known = len(counted) == len(found) and disk.enforced
    return DiskView(
        used=sum(usage.space for usage in counted) if known else None,
        limit=limit.disk,
        inodes=sum(usage.inodes for usage in counted) if known else None,
        inodes_limit=limit.inodes,
        enforced=disk.enforced and all(instance.project_id is not None for instance in instances),
    )


# -- project IDs -------------------------------------------------------------------------------------------------------


class ChosenProject(NamedTuple):
    id: int
    reservation: Reservation


async def choose_project(context: Context, instance_id: str) -> ChosenProject | None:
    """A free project ID for an instance, and its reservation; None where nothing is enforced.

    It is random, because root of an instance can read it: it doesn't tell how many others there are. It is in a window
    that depends on the root directory, for other insulads on the same file system; and the window is small, because xfs
    keeps the record of each ID that was ever used.
    """
    if not context.disk.enforced:
        return None
    start = crc32(os.fsencode(context.settings.root)) % (PROJECTS // _WINDOW) * _WINDOW

    def pick(taken: set[str]) -> str:
        span = _WINDOW
        while span < 2 * len(taken):
            span *= 2
        return next(text for text in iter(lambda: str((start + randbelow(span)) % PROJECTS), "") if text not in taken)

    project = FIRST_PROJECT + int(await context.allocators.of(_CLAIM).choose(pick))
    return ChosenProject(project, _reservation(context, project, instance_id))


def _reservation(context: Context, project: int, instance_id: str) -> Reservation:
    return Reservation(_CLAIM, str(project - FIRST_PROJECT), f"{context.host}/{instance_id}")


async def release_project(context: Context, project: int, instance_id: str) -> None:
    """Release the project ID of an instance whose tree is gone."""
    if context.disk.trouble:
        return  # the tree may be in the pool: the next start looks again
    with suppress(OSError):
        context.disk.release(project)
    reservation = _reservation(context, project, instance_id)
    await context.store.transact([], [reservation.delete()], durable=False)
    context.allocators.release([reservation])


async def reserved_projects(context: Context) -> dict[str, int]:
    """The project IDs reserved by this host, by the instance's ID."""
    found = {}
    for entry in (await context.store.list(f"/claims/{_CLAIM}/")).entries:
        host, _, instance_id = entry.value.decode(errors="replace").rpartition("/")
        if host == context.host:
            found[instance_id] = FIRST_PROJECT + int(entry.key.rpartition("/")[2])
    return found


def trees_in_pool(context: Context) -> set[str]:
    """The IDs of instances that have a tree in the pool. Blocks."""
    disk = context.disk
    if disk.trouble or disk.directory == context.settings.instances:
        return set()
    return set(os.listdir(disk.directory)) - {"lost+found"}


def has_tree(context: Context, instance_id: str) -> bool:
    """Whether files of the instance are left on this host. Blocks."""
    return any(os.path.lexists(each / instance_id) for each in (context.settings.instances, context.disk.directory))


# -- the watch ---------------------------------------------------------------------------------------------------------


class DiskWatch:
    """Watches the free space. `stop` is the verb that stops an instance of a tenant by name."""

    def __init__(
        self,
        context: Context,
        managed: ManagedInstances,
        recorder: Recorder,
        stop: Callable[[str, str], Awaitable[object]],
    ) -> None:
        self.context = context
        self.managed = managed
        self._recorder = recorder
        self._stop = stop
        self._next = 0.0  # when instances are measured again

    async def run(self) -> None:
        """Look every few seconds. It never ends, except when everything is being removed from this host."""
        while not self.context.going_down.is_set():
            await self.context.problems.guard("watch of the disk", self._look())
            await asyncio.sleep(_INTERVAL)

    async def _look(self) -> None:
        disk, problems = self.context.disk, self.context.problems
        if disk.trouble:
            problems["disk"] = disk.trouble
            return
        short = shortage(disk, self.context.settings)
        if short is None:
            problems.solved("disk")
            return
        problems["disk"] = f"no instance can be created: {short}"
        if not disk.enforced and time.monotonic() >= self._next:
            await self._evict()
            self._next = time.monotonic() + _PAUSE

    async def _evict(self) -> None:
        """Stop the instances that are above the limit of their disk."""
        few = asyncio.Semaphore(_AT_ONCE)

        async def examine(managed: ManagedInstance) -> None:
            async with few:
                over = await self._excess(managed)
            if over:
                log.warning("instance %s/%s is stopped: its disk has %s", *managed.key, over)
                self._recorder.record(managed, "evicted", disk=over)
                with suppress(InsulaError):  # it has just ended, or was removed
                    await self._stop(managed.instance.tenant, managed.instance.name)

        await asyncio.gather(*(examine(each) for each in self.managed.of(None) if each.active))

    async def _excess(self, managed: ManagedInstance) -> str | None:
        """How much an instance is above its limit; None if it is not, or if it has none."""
        limit, path = disk_limit(managed.instance), self.context.driver(managed.instance).writable(managed.instance.id)
        if path is None:
            return None
        if limit.space is not None and (space := await measured(path) or 0) > limit.space:
            return f"{format_size(space)} of {format_size(limit.space)}"
        if limit.inodes is not None and (inodes := await measured(path, inodes=True) or 0) > limit.inodes:
            return f"{inodes} of {limit.inodes} inodes"
        return None


def unlimited(instances: Sequence[Instance]) -> list[str]:
    """The names of those that have no limit of their disk."""
    return [each.name for each in instances if each.spec.resources.disk is None]
