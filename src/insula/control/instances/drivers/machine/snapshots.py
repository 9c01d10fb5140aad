"""`MachineSnapshots`: snapshots and copies of virtual machines; see `SnapshotFiles`.

    snapshots/ID/    a snapshot (stored.py)
    copies/ID/       a moment of which copies are being made
    resume/          what the next start goes on from: the same files, and `fresh.disk` and so on, copies of what the
                     machine writes to (`StoredMachine.disks`), which that start puts in their places

`resume` is there whole, or not at all, and one takes the place of another in one step. It stays until the machine has
answered that it goes on. If it does not, it is started again from the same moment, or booted from the disks of that
moment (`start --cold`). Without memory it is only there while the disks are put in their places: the next start does
that again if insulad is killed meanwhile. So a machine never has some disks of the moment and some of another time.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from insula.control.instances.drivers.machine import further_disks, stored, taking
from insula.control.instances.drivers.machine.fits import check_fits
from insula.control.instances.drivers.machine.memory import MomentMemory
from insula.control.instances.drivers.machine.request import MachineRequests
from insula.control.instances.drivers.machine.stored import DISK, FURTHER, MEMORY, STATE, VARIABLES, StoredMachine
from insula.control.instances.drivers.snapshots import Taken
from insula.control.workers import in_thread
from insula.kernel import syscalls
from insula.machine.blank import BlankDisks
from insula.model.disks import FurtherDisk
from insula.model.errors import Conflict
from insula.model.objects import Instance, Tenant, disks_of

_FRESH: Final = "fresh."
"""The names of fresh copies begin with it."""
_SPARE: Final = 1 << 20
"""Bytes of the record, and of what a file system needs for the files."""


class MachineSnapshots:
    """The files of snapshots. `netns` opens the network namespace of a machine's container, or raises NotFound. Disks
    that were not made yet are copies of `blank` ones."""

    copies_have_memory = True

    def __init__(self, requests: MachineRequests, netns: Callable[[str], int], blank: BlankDisks) -> None:
        self._requests = requests
        self._netns = netns
        self._blank = blank
        self._memory = MomentMemory()

    def close(self) -> None:
        """Close the memories that are kept for further machines."""
        self._memory.close()

    def _place(self, instance_id: str, *parts: str) -> Path:
        return self._requests.directory(instance_id).layer.joinpath(*parts)

    def _places(self, instance_id: str, disks: Sequence[FurtherDisk]) -> dict[str, Path]:
        """The files that a machine with these further disks writes to, by their names in a moment."""
        disk, directory = self._requests.disk(instance_id), self._requests.further_disks(instance_id)
        found = {DISK: disk, VARIABLES: disk.with_name(VARIABLES)}
        return found | {FURTHER + each.name: directory / each.name for each in disks}

    # -- snapshots -------------------------------------------------------------------------------------------------

    async def most(self, instance: Instance, *, memory: bool) -> int:
        places = self._places(instance.id, disks_of(instance.spec)).values()
        taken = await in_thread(None, lambda: sum(map(_taken, places)))
        return _SPARE + taken + (taking.most_memory(instance.spec) if memory else 0)

    async def take(self, instance: Instance, snapshot_id: str, *, memory: bool, running: bool) -> Taken:
        target, netns = self._place(instance.id, "snapshots", snapshot_id), partial(self._netns, instance.id)
        places = self._places(instance.id, disks_of(instance.spec))
        if not running:
            await in_thread(None, partial(self._prepare_to_take, instance))
        return await taking.take(instance, places, target, netns, memory=memory, running=running)

    def _prepare_to_take(self, instance: Instance) -> None:
        """Make the further disks of an instance that does not run, which its next start would make. Conflict, Failed,
        OSError."""
        self.check_own(instance)
        if self._requests.disk(instance.id).exists():
            for each in disks_of(instance.spec):
                further_disks.ensure(self._requests.further_disks(instance.id), each, self._blank)

    async def remove(self, instance_id: str, snapshot_id: str) -> None:
        await in_thread(None, partial(stored.remove, self._place(instance_id, "snapshots", snapshot_id)))

    async def check(self, instance: Instance, snapshot_id: str) -> None:
        found = await in_thread(None, partial(stored.read, self._place(instance.id, "snapshots", snapshot_id)))
        check_fits(instance.spec, found)

    async def restore(self, instance: Instance, snapshot_id: str) -> None:
        source = self._place(instance.id, "snapshots", snapshot_id)
        await in_thread(None, partial(self._restore, instance, source))

    def _restore(self, instance: Instance, source: Path) -> None:
        record, resume = stored.read(source), self._place(instance.id, "resume")
        check_fits(instance.spec, record)
        self._prepare(source, record, resume)
        if not record.has_memory:
            self._put(instance, record)
            stored.remove(resume)

    # -- copies ----------------------------------------------------------------------------------------------------

    async def take_for_copies(self, instance: Instance) -> tuple[str, Taken]:
        made = secrets.token_hex(16)
        target, netns = self._place(instance.id, "copies", made), partial(self._netns, instance.id)
        places, memory = self._places(instance.id, disks_of(instance.spec)), self.copies_have_memory
        return made, await taking.take(instance, places, target, netns, memory=memory, running=True, durable=False)

    async def place(self, instance: Instance, copies: str, tenant: Tenant, child_id: str) -> None:
        def place() -> None:
            source = self._place(instance.id, "copies", copies)
            self._requests.directory(child_id).make(tenant.id_base)
            self._prepare(source, stored.read(source), self._place(child_id, "resume"))

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
        """If the next start goes on from a moment, put the disks of that moment in place, and return what it is of;
        None if it does not, or if it is to be booted from these disks. Conflict, Failed, OSError. Blocks."""
        resume = self._place(instance.id, "resume")
        if not resume.is_dir():
            return None
        record = stored.read(resume)
        if not cold:
            check_fits(instance.spec, record)
        self._put(instance, record)
        if not record.has_memory:
            stored.remove(resume)
            return None
        return None if cold else record

    def _put(self, instance: Instance, record: StoredMachine) -> None:
        """Put the disks of the moment that a machine goes on from in their places, but for those that the instance has
        no more. OSError."""
        resume, disks = self._place(instance.id, "resume"), disks_of(instance.spec)
        places = self._places(instance.id, [each.disk for each in record.further if each.disk in disks])
        for name in places.keys() & {*record.disks}:
            fresh, place = resume / f"{_FRESH}{name}", places[name]
            place.parent.mkdir(mode=0o700, exist_ok=True)
            if not fresh.exists():  # it was started before, and has not answered
                fresh = place.with_name(f"{place.name}.new")
                stored.copy(resume / name, fresh)
            fresh.replace(place)  # without its lock: who has the old file still, such as a QEMU, does not get this one

    def check_own(self, instance: Instance) -> None:
        """Raise Conflict if the next start goes on from a moment: until then the instance has disks of another time."""
        if self._place(instance.id, "resume").is_dir():
            what = f"{instance.name} goes on from a snapshot when it is started"
            raise Conflict(what, f"`insula start {instance.name}`, and try again while it runs")

    def memory(self, instance_id: str) -> int:
        """A descriptor of the memory that the next start goes on with. OSError. Blocks."""
        return self._memory.open(self._place(instance_id, "resume", MEMORY))

    def state(self, instance_id: str) -> int:
        """A descriptor of the state that the next start goes on with. OSError."""
        return os.open(self._place(instance_id, "resume", STATE), os.O_RDONLY | os.O_CLOEXEC)

    def finish(self, instance_id: str) -> None:
        """Forget what the machine has gone on from, now that it goes on: its disk changes from now on. Blocks."""
        stored.remove(self._place(instance_id, "resume"))

    def _prepare(self, source: Path, record: StoredMachine, resume: Path) -> None:
        """Have the next start go on from a moment, with copies of its disks, and from no other one. OSError."""
        draft = resume.with_name("resume.new")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            stored.link(source, record, draft)
            for name in record.disks:
                stored.copy(draft / name, draft / f"{_FRESH}{name}")
            stored.sync_directory(draft)
            if resume.is_dir():
                syscalls.exchange(draft, resume)
            else:
                draft.rename(resume)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _taken(disk: Path) -> int:
    """The bytes that a disk takes; none if it was not made yet."""
    return disk.stat().st_blocks * 512 if disk.exists() else 0
