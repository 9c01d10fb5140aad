"""Further disks of machines: raw sparse files disks/NAME beside the disk of the root, with an ext4 if they are mounted.

The file of a disk is removed when no guest has it and the instance's spec does not name it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from insula.control.instances.drivers.machine import disk_lock
from insula.control.instances.drivers.machine.plugging import asked
from insula.control.workers import in_thread
from insula.kernel.rollback import Rollback
from insula.machine.blank import BlankDisks
from insula.model.disks import FurtherDisk
from insula.model.objects import Instance, disks_of


def ensure(directory: Path, disk: FurtherDisk, blank: BlankDisks) -> None:
    """Make the file of a disk, unless it is there. Blocks. Failed, OSError."""
    path = directory / disk.name
    directory.mkdir(mode=0o700, exist_ok=True)
    if not path.exists():
        if disk.mount:
            blank.make(path, _size(disk), of_root=False)
        else:
            make_bare(directory, disk)


def make_bare(directory: Path, disk: FurtherDisk) -> None:
    """Make the file of a disk, with nothing on it. Blocks. OSError."""
    path = directory / disk.name
    directory.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_name(f"{path.name}.new")
    with draft.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(_size(disk))
    draft.rename(path)


def _size(disk: FurtherDisk) -> int:
    return disk.size >> 20 << 20


def sweep(directory: Path, disks: Sequence[FurtherDisk]) -> None:
    """Remove the files of other disks than these. Blocks. OSError."""
    kept = {each.name for each in disks}
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name not in kept:
            path.unlink(missing_ok=True)


async def attach(netns: Callable[[], int], directory: Path, instance: Instance, blank: BlankDisks) -> None:
    """Give a machine that runs the disks of its spec, and no others. Failed, NotFound; Conflict if another machine has
    the file of one."""
    has = (await asked(netns(), {"ask": "devices"})).get("disks")
    have, disks = has if isinstance(has, list) else [], disks_of(instance.spec)
    names = {each.name for each in disks}
    for name in have:
        if name not in names:
            await asked(netns(), {"ask": "detach", "disk": name})
    await in_thread(None, lambda: sweep(directory, disks))
    for each in disks:
        with Rollback() as opened:
            of_it = each.name in have
            file = opened.hold(await in_thread(None, partial(_open, directory, each, blank, instance, of_it)))
            await asked(netns(), {"ask": "attach", "disk": each.name, "path": each.mount}, [file])


def _open(directory: Path, disk: FurtherDisk, blank: BlankDisks, instance: Instance, of_it: bool) -> int:
    """A descriptor of a disk, locked unless the machine has it already."""
    ensure(directory, disk, blank)
    path = directory / disk.name
    if of_it:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return disk_lock.open_locked(path, instance.id, instance.name)
