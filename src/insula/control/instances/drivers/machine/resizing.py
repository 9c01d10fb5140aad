"""A machine that gets other limits while it runs: the other side of `insula.machine.shim.resize`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec

from insula.control.instances.drivers.machine.plugging import asked
from insula.control.instances.drivers.machine.sizes import check_size
from insula.control.instances.drivers.machine.sizes import size as guest_size
from insula.machine.qemu.devices import MOST_MEMORY
from insula.model.disk_images import DiskRoot
from insula.model.errors import Conflict, Failed, Invalid
from insula.model.objects import Instance, Struct
from insula.model.units import format_size

_ACTIVE: Final = ("starting", "running", "paused", "stopping")


class PresentSize(Struct, kw_only=True):
    """What a machine says that it has: bytes of its disk, and how many its file system is smaller; MiB of memory, and
    those that it was started with; processors that run."""

    memory: Annotated[int, msgspec.Meta(ge=0, le=MOST_MEMORY)]
    base: Annotated[int, msgspec.Meta(ge=0, le=MOST_MEMORY)]
    cpus: int
    disk: int
    missing: int = 0


def check(before: Instance, after: Instance, state: str, disk: int, asked: int) -> None:
    """Check other limits of a machine, which is in this state and has `disk` bytes, of `asked`. Invalid, Conflict."""
    name, resources = before.name, after.spec.resources
    if resources.memory is None:
        raise Invalid("a virtual machine has memory of its own", "give its size, as in 512m")
    check_size(after.spec)
    if before.starts and asked < disk:
        what = f"the disk of a virtual machine only grows, and that of {name} has {format_size(disk)}"
        raise Invalid(what, "make another one with a smaller disk, and copy what is on it")
    if state not in _ACTIVE or resources == before.spec.resources:
        return
    if state == "paused":
        raise Conflict(f"{name} is paused, and its guest does not answer", "unpause it before")
    if guest_size(after.spec).memory < guest_size(before.spec).memory:
        raise Conflict(f"{name} runs, and the memory of a virtual machine only grows then", "stop it before")


async def size(netns: int) -> PresentSize:
    """What the machine has whose container has this network namespace, which is closed. Failed, NotFound."""
    return _present(await asked(netns, {"ask": "size"}))


async def grow(netns: int, instance: Instance, had: PresentSize, disk: int) -> Sequence[str]:
    """Have a machine grow from what it `had`, with `disk` bytes, and return what is not as it should be, as text.
    Failed, NotFound."""
    wanted = guest_size(instance.spec)
    has = _present(await asked(netns, {"ask": "resize", "disk": disk, **wanted._asdict()}))
    notes = []
    if has.memory < wanted.memory:
        notes.append(f"it has {format_size(has.memory << 20)} of memory until its next start")
    if has.cpus < wanted.cpus:
        notes.append(f"it has {has.cpus} of {wanted.cpus} processors until its next start")
    if has.missing > 0:
        notes.append("the file system of its disk is smaller than that until its next start")
    if has.disk > had.disk and isinstance(instance.root, DiskRoot):
        notes.append("the system in it has to enlarge its partitions and file systems")
    return notes


def _present(answer: dict[str, Any]) -> PresentSize:
    try:
        return msgspec.convert(answer, PresentSize)
    except msgspec.ValidationError:
        raise Failed("the machine answers with what is no answer", "start it again") from None
