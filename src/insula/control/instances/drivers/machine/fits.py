"""`check_fits`: whether a machine, as it is now, can go back to a moment (stored.py)."""

from __future__ import annotations

from collections.abc import Collection

from insula.control.instances.drivers.machine.sizes import size
from insula.control.instances.drivers.machine.stored import StoredMachine
from insula.model.disks import FurtherDisk
from insula.model.errors import Conflict
from insula.model.objects import InstanceSpec, disks_of
from insula.model.units import format_size, shorten


def check_fits(spec: InstanceSpec, moment: StoredMachine) -> None:
    """Raise Conflict unless a machine with this spec can go back to that moment: it has the same further disks, and if
    the moment has its memory, it is the same machine."""
    _check_disks(disks_of(spec), [each.disk for each in moment.further])
    if not moment.has_memory:
        return
    now = size(spec)
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


def _check_disks(now: Collection[FurtherDisk], then: Collection[FurtherDisk]) -> None:
    """Raise Conflict unless these are the same disks: else parts of the moment would have no place, or what the machine
    has on a disk would stay as it is beside a root of another time."""
    if {each.name: each for each in now} != {each.name: each for each in then}:
        what = f"the snapshot is of a machine with {_list(then)}, and it has {_list(now)} now"
        raise Conflict(what, "give it the same again (insula disk add, insula disk rm)")


def _list(disks: Collection[FurtherDisk]) -> str:
    """Further disks, as text."""
    found = sorted(f"{each.name} ({format_size(each.size)}{_place(each)})" for each in disks)
    return f"the further disk{'s' * (len(found) > 1)} {', '.join(found)}" if found else "no further disk"


def _place(disk: FurtherDisk) -> str:
    return f" at {shorten(disk.mount)}" if disk.mount else ""
