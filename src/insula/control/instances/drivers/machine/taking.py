"""The making of a snapshot or a copy of a machine (stored.py): of its disks while it stands still, and its memory."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from insula.control.instances.drivers.machine import disk_lock, resizing, stored
from insula.control.instances.drivers.machine.moment import MachineDevices, Stood, stand_still
from insula.control.instances.drivers.machine.sizes import size
from insula.control.instances.drivers.machine.stored import (
    DISK,
    MEMORY,
    STATE,
    VARIABLES,
    StoredDisk,
    StoredMachine,
)
from insula.control.instances.drivers.snapshots import Taken
from insula.control.tasks import together
from insula.control.workers import in_thread
from insula.kernel import copies
from insula.kernel.rollback import Rollback
from insula.machine.qemu import stream
from insula.model.errors import Conflict, Failed, NotFound
from insula.model.objects import Instance, InstanceSpec, disks_of

_DEVICES: Final = 32 << 20
"""Bytes of the state of devices, at most, of which a screen has 16 MiB."""
_HEADERS: Final = 256
"""QEMU writes a header for each page, which is less than so large a part of the memory."""
_CHUNK: Final = 1 << 20
_AGAIN: Final = "try again; if that does not help, stop and start it"


class _CopiedFile(NamedTuple):
    """A file and its copy, which is empty yet, as descriptors, and the path of the file."""

    path: Path
    source: int
    target: int


def most_memory(spec: InstanceSpec) -> int:
    """The bytes that a guest's memory takes in a file, at most."""
    memory = size(spec).memory << 20
    return memory + memory // _HEADERS + _DEVICES


async def take(
    instance: Instance,
    places: Mapping[str, Path],
    target: Path,
    netns: Callable[[], int],
    *,
    memory: bool,
    running: bool,
    durable: bool = True,
) -> Taken:
    """Make the directory `target` with the files of this moment: of those at the `places`, by the names that they get,
    and of the `memory` if that is wanted. `netns` opens the network namespace of the machine's container, if it is
    `running`. `durable` files are there after a power failure too. Conflict, Failed, NotFound: nothing is made then."""
    draft = target.with_name(f"{target.name}.new")
    try:
        with Rollback() as opened:
            files = await in_thread(None, partial(_open, instance, places, draft, opened))
            copying = partial(in_thread, None, partial(_copy_all, instance, files))
            if not running:
                await copying()
                has = {each.name: 0 for each in disks_of(instance.spec)}
                stood = Stood(0.0, "", "", MachineDevices(**size(instance.spec)._asdict(), disks=has))
            elif memory:
                stood = await _with_memory(instance, draft, netns, copying)
            else:
                stood = await stand_still(netns(), None, copying)
        record = StoredMachine(
            **stood.devices.without_disks(),
            interfaces=len(instance.spec.networks),
            qemu=stood.qemu,
            machine=stood.machine,
            further=_further(instance, stood.devices),
        )
        taken = await in_thread(None, partial(_complete, draft, target, record, durable))
    except OSError as error:
        await in_thread(None, partial(shutil.rmtree, draft, ignore_errors=True))
        raise Failed(f"no snapshot was made: {error.strerror}", "free some space, and try again") from error
    except BaseException:
        await in_thread(None, partial(shutil.rmtree, draft, ignore_errors=True))
        raise
    return Taken(taken, stood.seconds)


async def _with_memory(
    instance: Instance, draft: Path, netns: Callable[[], int], copying: Callable[[], Awaitable[object]]
) -> Stood:
    """Have the machine stand still, and write its memory, which QEMU sends through a pipe: it gets no file, which
    it could write to later, and sends no more than the guest has."""
    memory = (await resizing.size(netns())).base << 20  # what was plugged in is in the state
    with Rollback() as opened:
        target, state = await in_thread(None, lambda: (_create(draft / MEMORY, opened), _create(draft / STATE, opened)))
        read, write = os.pipe2(os.O_CLOEXEC)
        opened.hold(read)
        fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, _CHUNK)
        over = threading.Event()
        most = most_memory(instance.spec)
        receiving = partial(in_thread, None, partial(stream.split, read, target, state, memory, most, over))

        async def both() -> None:
            await together(copying(), receiving())

        try:
            held = netns()
        except NotFound:
            os.close(write)
            raise
        return await stand_still(held, write, both, over.set)


def _further(instance: Instance, devices: MachineDevices) -> list[StoredDisk]:
    """The further disks that a machine had at the moment, in its order. Conflict if those of the instance are others:
    one is just added or removed, or the guest has let go of one."""
    disks = {each.name: each for each in disks_of(instance.spec)}
    if disks.keys() != devices.disks.keys():
        has = ", ".join(sorted(devices.disks.keys() & disks.keys())) or "none"
        what = f"{instance.name} has the further disks {', '.join(sorted(disks)) or 'none'}, and in its guest are {has}"
        raise Conflict(what, _AGAIN)
    return [StoredDisk(disk=disks[name], slot=slot) for name, slot in devices.disks.items()]


def _open(instance: Instance, places: Mapping[str, Path], draft: Path, opened: Rollback) -> list[_CopiedFile]:
    """Make the directory of a draft, and open the files, each with its copy."""
    if not places[DISK].exists():
        raise Failed("the machine has no disk yet: it was never started", "start it before")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700, parents=True)
    found = []
    for name, path in places.items():
        if path.exists():
            source = opened.hold(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            found.append(_CopiedFile(path, source, _create(draft / name, opened)))
        elif name != VARIABLES:
            raise Conflict(f"the disks of {instance.name} are changing", _AGAIN)
    return found


def _copy_all(instance: Instance, files: list[_CopiedFile]) -> None:
    """Copy files while nobody writes to them. Conflict if one was replaced since it was opened: a disk was removed, and
    another one has its name."""
    for each in files:
        if not disk_lock.is_same(each.source, each.path):
            raise Conflict(f"the disks of {instance.name} were changed meanwhile", _AGAIN)
        copies.copy(each.source, each.target)


def _create(path: Path, opened: Rollback) -> int:
    """Create a file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return opened.hold(os.open(path, flags, 0o600))


def _complete(draft: Path, target: Path, record: StoredMachine, durable: bool) -> int:
    taken = stored.finish(draft, record, durable=durable)
    draft.rename(target)
    if durable:
        stored.sync_directory(target.parent)
    return taken
