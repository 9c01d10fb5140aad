"""The making of a snapshot or a copy of a machine (stored.py): of its disk while it stands still, and of its memory."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from insula.control.instances.drivers.machine import resizing, stored
from insula.control.instances.drivers.machine.moment import MachineDevices, Stood, stand_still
from insula.control.instances.drivers.machine.sizes import size
from insula.control.instances.drivers.machine.stored import DISK, MEMORY, STATE, VARIABLES, StoredMachine
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


def most_memory(spec: InstanceSpec) -> int:
    """The bytes that a guest's memory takes in a file, at most."""
    memory = size(spec).memory << 20
    return memory + memory // _HEADERS + _DEVICES


async def take(
    instance: Instance,
    disk: Path,
    target: Path,
    netns: Callable[[], int],
    *,
    memory: bool,
    running: bool,
    durable: bool = True,
) -> Taken:
    """Make the directory `target` with the files of this moment: of the `disk`, of what is beside it, and of the
    `memory` if that is wanted. `netns` opens the network namespace of the machine's container, if it is `running`.
    `durable` files are there after a power failure too. Conflict, Failed, NotFound: nothing is made then."""
    draft = target.with_name(f"{target.name}.new")
    if disks_of(instance.spec):
        what = f"{instance.name} has further disks, and a snapshot or a copy has only the disk of its root"
        raise Conflict(what, "remove them before (insula disk rm)")
    try:
        with Rollback() as opened:
            disks = await in_thread(None, partial(_open, disk, draft, opened))
            copying = partial(in_thread, None, partial(_copy_all, disks))
            if not running:
                await copying()
                stood = Stood(0.0, "", "", MachineDevices(**size(instance.spec)._asdict()))
            elif memory:
                stood = await _with_memory(instance, draft, netns, copying)
            else:
                stood = await stand_still(netns(), None, copying)
        record = StoredMachine(
            **msgspec.structs.asdict(stood.devices),
            interfaces=len(instance.spec.networks),
            qemu=stood.qemu,
            machine=stood.machine,
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
        targets = await in_thread(None, partial(_create, draft, opened))
        read, write = os.pipe2(os.O_CLOEXEC)
        opened.hold(read)
        fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, _CHUNK)
        over = threading.Event()
        most = most_memory(instance.spec)
        receiving = partial(in_thread, None, partial(stream.split, read, *targets, memory, most, over))

        async def both() -> None:
            await together(copying(), receiving())

        try:
            held = netns()
        except NotFound:
            os.close(write)
            raise
        return await stand_still(held, write, both, over.set)


def _open(source: Path, draft: Path, opened: Rollback) -> list[tuple[int, int]]:
    """Make the directory of a draft, and open the disk and what is beside it, each with its copy."""
    if not source.exists():
        raise Failed("the machine has no disk yet: it was never started", "start it before")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700, parents=True)
    found = [path for name in (DISK, VARIABLES) if (path := source.with_name(name)).exists()]
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return [
        (opened.hold(os.open(path, os.O_RDONLY | os.O_CLOEXEC)), opened.hold(os.open(draft / path.name, new, 0o600)))
        for path in found
    ]


def _copy_all(files: list[tuple[int, int]]) -> None:
    for source, target in files:
        copies.copy(source, target)


def _create(draft: Path, opened: Rollback) -> tuple[int, int]:
    """Create the files of the memory and of the state."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    memory, state = (opened.hold(os.open(draft / name, flags, 0o600)) for name in (MEMORY, STATE))
    return memory, state


def _complete(draft: Path, target: Path, record: StoredMachine, durable: bool) -> int:
    taken = stored.finish(draft, record, durable=durable)
    draft.rename(target)
    if durable:
        stored.sync_directory(target.parent)
    return taken
