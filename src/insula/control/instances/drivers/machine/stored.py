"""A machine at one moment, as a directory: `disk`, `further.NAME` of each further disk, `variables` of UEFI firmware if
it has any, `memory` and `state` (of devices and processors) if they were kept, and `machine.json`, which tells what
they are of.

Memory and disks belong together: a guest that goes on with the memory of one moment and the disk of another destroys
its file system, since it has parts of that in memory. So the record has the size and the time of all files, and what
differs is refused. The files are never changed: a machine that goes on gets copies of the disks.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any, Final

import msgspec

from insula.control.instances.drivers.directory import boot_id
from insula.kernel import copies, records
from insula.kernel.rollback import Rollback
from insula.model import rules
from insula.model.disks import FurtherDisk
from insula.model.errors import Failed
from insula.model.objects import Struct

DISK: Final = "disk"
MEMORY: Final = "memory"
STATE: Final = "state"
VARIABLES: Final = "variables"
FURTHER: Final = "further."
"""The names of the files of further disks begin with it."""
_FILES: Final = (DISK, VARIABLES, MEMORY, STATE)
RECORD: Final = "machine.json"
_MODE = 0o400


class FileMark(Struct, kw_only=True):
    """What tells a file from another one of the same name: its size, and when it was written, in nanoseconds."""

    size: int
    written: int


class StoredDisk(Struct, kw_only=True):
    """A further disk of a machine at one moment, and its slot (`insula.machine.qemu.devices`): 0 if it was in none, or
    if the memory was not kept."""

    disk: FurtherDisk
    slot: int = 0

    @property
    def file(self) -> str:
        """The name of its file."""
        return FURTHER + self.disk.name


class StoredMachine(Struct, kw_only=True):
    """The record of a machine at one moment. A machine with its memory has as much memory, as many processors and as
    many network devices, in the same `slots` (`insula.machine.qemu.devices`), and so are its `further` disks. `memory`
    is in MiB, and so are `modules`, which were plugged in, as `plugged` processors were. A machine on no network has a
    device too. `boot` is the boot of the host in which the files count, if they may not be on the disk after a power
    failure."""

    memory: int
    cpus: int
    interfaces: int
    slots: list[int] = msgspec.field(default_factory=list)
    modules: list[int] = msgspec.field(default_factory=list)
    plugged: int = 0
    qemu: str = ""
    machine: str = ""
    boot: str = ""
    further: list[StoredDisk] = msgspec.field(default_factory=list)
    files: dict[str, FileMark] = msgspec.field(default_factory=dict)

    @property
    def all_memory(self) -> int:
        return self.memory + sum(self.modules)

    @property
    def all_cpus(self) -> int:
        return self.cpus + self.plugged

    @property
    def has_memory(self) -> bool:
        return MEMORY in self.files

    @property
    def has_state(self) -> bool:
        """Whether the memory is as it is in the guest, without the state: it was written otherwise once."""
        return STATE in self.files

    @property
    def disks(self) -> list[str]:
        """The files that a machine writes to: it gets copies of them."""
        return [name for name in self.names if name in self.files and name not in (MEMORY, STATE)]

    @property
    def names(self) -> list[str]:
        """The files that there may be."""
        return [*_FILES, *(each.file for each in self.further)]

    def check(self) -> None:
        """Raise ValueError unless the files are those of a machine, with all of its disks."""
        for each in self.further:
            if not re.fullmatch(rules.DISK, each.disk.name):
                raise ValueError("a disk in it has no name")
        if not {DISK, *(each.file for each in self.further)} <= self.files.keys():
            raise ValueError("it has not all disks")
        if not self.files.keys() <= {*self.names}:
            raise ValueError("there are other files")


def finish(draft: Path, record: StoredMachine, *, durable: bool = True) -> int:
    """Complete a directory whose files are written, make it `durable`, and return what its files take. Blocks.
    OSError."""
    marks, size = dict[str, FileMark](), 0
    for name in record.names:
        if (path := draft / name).exists():
            if durable:
                _sync(path, os.O_RDONLY)
            path.chmod(_MODE)
            status = path.stat()
            marks[name] = FileMark(size=status.st_size, written=status.st_mtime_ns)
            size += status.st_blocks * 512
    record = msgspec.structs.replace(record, files=marks, boot="" if durable else boot_id())
    records.replace(draft / RECORD, msgspec.json.encode(record))
    (draft / RECORD).chmod(_MODE)
    if durable:
        _sync(draft / RECORD, os.O_RDONLY)
        sync_directory(draft)
    return size


def read(directory: Path) -> StoredMachine:
    """The record of a directory, whose files are those of the record. Failed if they are not. Blocks."""
    hint = "it can't be used any more: remove it"
    try:
        found = msgspec.json.decode(records.read(directory / RECORD), type=StoredMachine)
        found.check()
        for name, mark in found.files.items():
            status = (directory / name).stat()
            if (status.st_size, status.st_mtime_ns) != (mark.size, mark.written):
                raise Failed(f"the snapshot is damaged: {_changed(found)}", hint)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Failed(f"the snapshot is damaged: {error}", hint) from None
    if found.boot not in ("", boot_id()):
        raise Failed("the host was restarted before the copy had started", "remove it, and fork again")
    return found


def _changed(found: StoredMachine) -> str:
    """What it means that a file is another one than it was."""
    if found.has_memory:
        return "its disk and its memory are not of one moment"
    return "its disks are not of one moment" if found.further else "its disk was changed"


def link(source: Path, record: StoredMachine, target: Path) -> None:
    """Make another directory with the files of a record, which take no space of their own. Blocks. OSError."""
    target.mkdir(mode=0o700)
    for name in (*record.files, RECORD):
        _link(source / name, target / name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # one instance is older than the pool
            raise
        status = source.stat()
        copy(source, target)
        os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))


def copy(source: Path, target: Path) -> None:
    """Copy a disk to a new file, which belongs to nobody else. Blocks. OSError."""
    with Rollback() as opened:
        given = opened.hold(os.open(source, os.O_RDONLY | os.O_CLOEXEC))
        made = opened.hold(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        copies.copy(given, made)


def remove(directory: Path) -> None:
    """Remove a directory: first its name, so that nobody takes what is left for a whole one. Blocks. OSError."""
    gone = directory.with_name(f"{directory.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    try:
        directory.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, onerror=_raise_unless_gone)


def _raise_unless_gone(_: object, __: str, failure: Any) -> None:
    """Raise an error of a removal, unless somebody else removes the same (`shutil.rmtree`)."""
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def sync_directory(directory: Path) -> None:
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
