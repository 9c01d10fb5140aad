"""`Disks`: gives virtual machines further disks, and takes them away, while they run or not.

The disks are in the spec, and its host attaches and detaches them. The file of a disk that is gone from the spec is
removed as soon as the guest has let go of it, or before the next start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from insula.control.instances.admission import respecify
from insula.control.instances.checks import Known, as_it_is
from insula.control.instances.specs import check_disks, cli_command
from insula.control.instances.verbs import Instances
from insula.control.tasks import Tasks
from insula.model.disks import FurtherDisk
from insula.model.errors import Conflict, InsulaError, Invalid, NotFound
from insula.model.objects import Instance, InstanceSpec, MachineOptions, disks_of
from insula.model.rules import MAX_DISKS
from insula.model.units import shorten
from insula.model.views import InstanceView
from insula.store.typed import Found

WantedDisks = Callable[[Instance], Sequence[FurtherDisk]]


class Disks:
    def __init__(self, instances: Instances, tasks: Tasks) -> None:
        self.instances = instances
        self._tasks = tasks

    async def add(self, tenant: str, name: str, disk: FurtherDisk) -> InstanceView:
        """Commit one more disk, and return when the guest has it; after an error it is taken back. Invalid, NotFound,
        Conflict, QuotaExceeded, Failed."""

        def wanted(instance: Instance) -> Sequence[FurtherDisk]:
            before = disks_of(instance.spec)
            if any(each.name == disk.name for each in before):
                raise Conflict(f"instance {name} has a disk {disk.name} already", "choose another name")
            if len(before) >= MAX_DISKS:
                raise Conflict(f"instance {name} has {MAX_DISKS} further disks", "remove one, or make a larger one")
            return [*before, disk]

        return await self._whole(tenant, name, wanted)

    async def remove(self, tenant: str, name: str, disk: str) -> InstanceView:
        """Commit that a disk is gone, with what is on it, and return when it is; if the guest does not let go of it, it
        is kept. NotFound, Conflict, Failed."""

        def wanted(instance: Instance) -> Sequence[FurtherDisk]:
            before = disks_of(instance.spec)
            kept = [each for each in before if each.name != disk]
            if kept == before:
                hint = f"{cli_command(tenant, f'disk ls {name}')} lists its disks"
                raise NotFound(f"instance {name} has no disk {shorten(disk)}", hint)
            return kept

        return await self._whole(tenant, name, wanted)

    async def _whole(self, tenant: str, name: str, wanted: WantedDisks) -> InstanceView:
        """Do the work to its end, also if the client disconnects."""
        return await asyncio.shield(self._tasks.spawn(self._change(tenant, name, wanted)))

    async def _change(self, tenant: str, name: str, wanted: WantedDisks) -> InstanceView:
        context, before = self.instances.context, InstanceSpec(image="")

        async def attempt(known: Known) -> Found[Instance]:
            nonlocal before
            before = known.instance.spec
            _check(known)
            spec = _with(before, wanted(known.instance))
            check_disks(disks_of(spec))
            context.driver(known.instance).check_disks(known.instance, disks_of(spec), active=known.active)
            return await respecify(context, as_it_is(known), known.revision, spec)

        async def undo(known: Known) -> Found[Instance]:
            spec = _with(known.instance.spec, disks_of(before))
            return await respecify(context, as_it_is(known), known.revision, spec, undo=True)

        found = await self.instances.commit(tenant, name, attempt)
        assert found
        try:
            return await self.instances.converged(found)
        except InsulaError:
            if taken_back := await self.instances.commit(tenant, name, undo):
                await self.instances.converged(taken_back)
            raise


def _check(known: Known) -> None:
    """Raise Invalid for an instance that has no further disks, Conflict if it can't get or lose one now."""
    name = known.instance.name
    if not isinstance(known.instance.spec.options, MachineOptions):
        raise Invalid(f"{name} is a container, which has no disks", "`insula run --vm` makes virtual machines")
    if known.active and known.status.state != "running":
        raise Conflict(f"{name} is {known.status.state}, and its guest does not answer", "try again when it runs")


def _with(spec: InstanceSpec, disks: Sequence[FurtherDisk]) -> InstanceSpec:
    assert isinstance(spec.options, MachineOptions)
    return msgspec.structs.replace(spec, options=msgspec.structs.replace(spec.options, disks=[*disks]))
