"""`MachineSnapshots`: snapshots and copies of virtual machines; see `SnapshotFiles`.

    snapshots/ID/    a snapshot (stored.py)
    copies/ID/       a moment of which copies are being made
    resume/          what the next start goes on from: the same files, and `fresh`, a copy of the disk for that start

Machines with UEFI firmware have its variables beside their disk, and in all of these.

`resume` stays until the machine has answered that it goes on. If it does not, it is started again from the same moment,
or booted from the disk of that moment (`start --cold`).
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Final

from insula.control.instances.drivers.machine import stored, taking
from insula.control.instances.drivers.machine.memory import MomentMemory
from insula.control.instances.drivers.machine.request import MachineRequests
from insula.control.instances.drivers.machine.sizes import size
from insula.control.instances.drivers.machine.stored import DISK, MEMORY, STATE, VARIABLES, StoredMachine
from insula.control.instances.drivers.snapshots import Taken
from insula.control.workers import in_thread
from insula.model.errors import Conflict
from insula.model.objects import Instance, InstanceSpec, Tenant, disks_of
from insula.model.units import format_size

_FRESH: Final = "fresh"
_SPARE: Final = 1 << 20
"""Bytes of the record, and of what a file system needs for the files."""


class MachineSnapshots:
    """The files of snapshots. `netns` opens the network namespace of a machine's container, or raises NotFound."""

    copies_have_memory = True

    def __init__(self, requests: MachineRequests, netns: Callable[[str], int]) -> None:
        self._requests = requests
        self._netns = netns
        self._memory = MomentMemory()

    def close(self) -> None:
        """Close the memories that are kept for further machines."""
        self._memory.close()

    def _place(self, instance_id: str, *parts: str) -> Path:
        return self._requests.directory(instance_id).layer.joinpath(*parts)

    # -- snapshots -------------------------------------------------------------------------------------------------

    async def most(self, instance: Instance, *, memory: bool) -> int:
        taken = await in_thread(None, partial(_taken, self._requests.disk(instance.id)))
        return _SPARE + taken + (taking.most_memory(instance.spec) if memory else 0)

    async def take(self, instance: Instance, snapshot_id: str, *, memory: bool, running: bool) -> Taken:
        target, netns = self._place(instance.id, "snapshots", snapshot_id), partial(self._netns, instance.id)
        disk = self._requests.disk(instance.id)
        return await taking.take(instance, disk, target, netns, memory=memory, running=running)

    async def remove(self, instance_id: str, snapshot_id: str) -> None:
        await in_thread(None, partial(stored.remove, self._place(instance_id, "snapshots", snapshot_id)))

    async def check(self, instance: Instance, snapshot_id: str) -> None:
        found = await in_thread(None, partial(stored.read, self._place(instance.id, "snapshots", snapshot_id)))
        check_fits(instance.spec, found)

    async def restore(self, instance: Instance, snapshot_id: str) -> None:
        source = self._place(instance.id, "snapshots", snapshot_id)
        await in_thread(None, partial(self._restore, instance, source))

    def _restore(self, instance: Instance, source: Path) -> None:
        record = stored.read(source)
        check_fits(instance.spec, record)
        if record.has_memory:
            self._prepare(source, self._place(instance.id, "resume"))
            return
        disk = self._requests.disk(instance.id)
        fresh = disk.with_name("disk.new")
        stored.copy(source / DISK, fresh)
        stored.remove(self._place(instance.id, "resume"))
        fresh.replace(disk)
        _put_variables(source, disk)

    # -- copies ----------------------------------------------------------------------------------------------------

    async def take_for_copies(self, instance: Instance) -> tuple[str, Taken]:
        made = secrets.token_hex(16)
        target, netns = self._place(instance.id, "copies", made), partial(self._netns, instance.id)
        disk, memory = self._requests.disk(instance.id), self.copies_have_memory
        return made, await taking.take(instance, disk, target, netns, memory=memory, running=True, durable=False)

    async def place(self, instance: Instance, copies: str, tenant: Tenant, child_id: str) -> None:
        def place() -> None:
            self._requests.directory(child_id).make(tenant.id_base)
            self._prepare(self._place(instance.id, "copies", copies), self._place(child_id, "resume"))

        await in_thread(None, place)

    async def remove_copies(self, instance_id: str, copies: str) -> None:
        await in_thread(None, partial(stored.remove, self._place(instance_id, "copies", copies)))

    async def sweep(self, instance_id: str, kept: Collection[str]) -> None:
        await in_thread(None, partial(self._sweep, instance_id, kept))

    def _sweep(self, instance_id: str, kept: Collection[str]) -> None:
        for kind in ("snapshots", "copies"):
            directory = self._place(instance_id, kind)
            for name in os.listdir(directory) if directory.is_dir() else ():
                if name not in kept:
                    shutil.rmtree(directory / name)
        for name in ("resume.new", "resume.gone"):
            shutil.rmtree(self._place(instance_id, name), ignore_errors=True)

    # -- starts ----------------------------------------------------------------------------------------------------

    def begin(self, instance: Instance, *, cold: bool) -> StoredMachine | None:
        """If the next start goes on from a moment, put the disk of that moment in place, and return what it is of; None
        if it does not, or if it is to be booted from that disk. Conflict, Failed, OSError. Blocks."""
        resume, disk = self._place(instance.id, "resume"), self._requests.disk(instance.id)
        if not resume.is_dir():
            return None
        record = stored.read(resume)
        if not cold:
            check_fits(instance.spec, record)
        fresh = resume / _FRESH
        if not fresh.exists():  # it was started before, and has not answered
            fresh = disk.with_name("disk.new")
            stored.copy(resume / DISK, fresh)
        fresh.replace(disk)
        _put_variables(resume, disk)
        return None if cold else record

    def is_pending(self, instance_id: str) -> bool:
        """Whether the next start goes on from a moment."""
        return self._place(instance_id, "resume").is_dir()

    def memory(self, instance_id: str) -> int:
        """A descriptor of the memory that the next start goes on with. OSError. Blocks."""
        return self._memory.open(self._place(instance_id, "resume", MEMORY))

    def state(self, instance_id: str) -> int:
        """A descriptor of the state that the next start goes on with. OSError."""
        return os.open(self._place(instance_id, "resume", STATE), os.O_RDONLY | os.O_CLOEXEC)

    def finish(self, instance_id: str) -> None:
        """Forget what the machine has gone on from, now that it goes on: its disk changes from now on. Blocks."""
        stored.remove(self._place(instance_id, "resume"))

    def _prepare(self, source: Path, resume: Path) -> None:
        """Have the next start go on from a moment, with a copy of its disk. OSError."""
        draft = resume.with_name("resume.new")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            stored.link(source, draft)
            stored.copy(draft / DISK, draft / _FRESH)
            stored.sync_directory(draft)
            stored.remove(resume)
            draft.rename(resume)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def check_fits(spec: InstanceSpec, moment: StoredMachine) -> None:
    """Raise Conflict unless a machine with this spec can go on with the memory of that moment."""
    now = size(spec)
    if not moment.has_memory:
        return
    if disks_of(spec):
        what = "the instance has further disks, which the machine of the snapshot does not know"
        raise Conflict(what, "remove them before (insula disk rm)")
    if (moment.interfaces and not moment.slots) or not moment.has_state:
        what = "the snapshot was made by an earlier version of Insula, whose machines had other devices"
        raise Conflict(what, "make another one")
    if now.memory != moment.all_memory or now.cpus > moment.all_cpus:
        had = f"{format_size(moment.all_memory << 20)} of memory and {moment.all_cpus} processors"
        has = f"{format_size(now.memory << 20)} and {now.cpus}"
        raise Conflict(f"the snapshot is of a machine with {had}, and it has {has} now", "give it the same again")
    if len(spec.networks) != moment.interfaces:
        what = f"the snapshot is of a machine on {moment.interfaces} networks, and it is on {len(spec.networks)} now"
        raise Conflict(what, "plug it into as many again")


def _taken(disk: Path) -> int:
    """The bytes that a disk takes; none if it was not made yet."""
    return disk.stat().st_blocks * 512 if disk.exists() else 0


def _put_variables(source: Path, disk: Path) -> None:
    """Put the variables of a moment beside a disk, if it has any. OSError."""
    if (source / VARIABLES).exists():
        fresh = disk.with_name(f"{VARIABLES}.new")
        stored.copy(source / VARIABLES, fresh)
        fresh.replace(disk.with_name(VARIABLES))
