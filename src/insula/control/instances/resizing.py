"""`resize` and `attach_disks`: give an instance that runs other limits, and other disks. The caller holds its lock."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from insula.control.context import Context
from insula.control.disk import resize_disk
from insula.control.instances.attached import CD, attached
from insula.control.instances.drivers.base import Driver
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.statuses import Statuses
from insula.model.errors import NotFound


async def resize(context: Context, statuses: Statuses, managed: ManagedInstance, driver: Driver) -> None:
    """Apply the desired limits, and record what is not as they say yet. Failed if they are refused."""
    resources, before = managed.instance.spec.resources, managed.status.resources
    statuses.note(managed, resources=None)  # after a failure some of them may be applied
    resize_disk(context.disk, managed.instance, before)
    notes: Sequence[str] = ()
    with suppress(NotFound):  # it is just ending
        notes = await driver.resize(managed.instance)
    statuses.note(managed, resources=resources, notes=[*notes])


async def attach_disks(statuses: Statuses, managed: ManagedInstance, driver: Driver) -> None:
    """Give it the wanted disks and CDs, and no others. Failed if its guest does not let go of a disk."""
    wanted, before = attached(managed.instance), managed.status.disks
    if cds := {each for each in {*wanted} ^ {*before} if each.startswith(CD)}:  # after a failure some may be changed
        statuses.note(managed, disks=[*(each for each in before if each not in cds), f"{CD}changing"])
    with suppress(NotFound):  # it is just ending
        await driver.attach_disks(managed.instance)
    statuses.note(managed, disks=wanted)
