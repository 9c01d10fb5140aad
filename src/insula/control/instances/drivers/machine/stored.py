"""A machine at one moment, as a directory: `disk`, `variables` of UEFI firmware if it has any, `memory` and `state` (of
devices and processors) if they were kept, and `machine.json`, which tells what they are of.

Memory and disk are a pair: a guest that goes on with the memory of one moment and the disk of another destroys its file
system, since it has parts of that in memory. So the record has the size and the time of all files, and what differs is
refused. The files are never changed: a machine that goes on gets a copy of the disk.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any, Final

import msgspec

from insula.control.instances.drivers.directory import boot_id
from insula.kernel import copies, records
from insula.kernel.rollback import Rollback
from insula.model.errors import Failed
from insula.model.objects import Struct

DISK: Final = "disk"
MEMORY: Final = "memory"
STATE: Final = "state"
VARIABLES: Final = "variables"
_FILES: Final = (DISK, VARIABLES, MEMORY, STATE)
RECORD: Final = "machine.json"
_MODE = 0o400


class FileMark(Struct, kw_only=True):
    """What tells a file from another one of the same name: its size, and when it was written, in nanoseconds."""

    size: int
    written: int


class StoredMachine(Struct, kw_only=True):
    """The record of a machine at one moment. A machine with its memory has as much memory, as many processors and as
    many network devices, in the same `slots` (`insula.machine.qemu.devices`). `memory` is in MiB, and so are
    `modules`, which were plugged in, as `plugged` processors were. A machine on no network has a device too. `boot` is
    the boot of the host in which the files count, if they may not be on the disk after a power failure."""

    memory: int
    cpus: int
    interfaces: int
    slots: list[int] = msgspec.field(default_factory=list)
    modules: list[int] = msgspec.field(default_factory=list)
    plugged: int = 0
    qemu: str = ""
    machine: str = ""
    boot: str = ""
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


def finish(draft: Path, record: StoredMachine, *, durable: bool = True) -> int:
    """Complete a directory whose files are written, make it `durable`, and return what its files take. Blocks.
    OSError."""
    marks, size = dict[str, FileMark](), 0
    for name in _FILES:
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
        for name, mark in found.files.items():
            status = (directory / name).stat()
            if (status.st_size, status.st_mtime_ns) != (mark.size, mark.written):
                what = "its disk and its memory are not of one moment" if found.has_memory else "its disk was changed"
                raise Failed(f"the snapshot is damaged: {what}", hint)
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Failed(f"the snapshot is damaged: {error}", hint) from None
    if found.boot not in ("", boot_id()):
        raise Failed("the host was restarted before the copy had started", "remove it, and fork again")
    if DISK not in found.files:
        raise Failed("the snapshot is damaged: it has no disk", hint)
    return found


def link(source: Path, target: Path) -> None:
    """Make another directory with the same files, which take no space of their own. Blocks. OSError."""
    target.mkdir(mode=0o700)
    for name in (*_FILES, RECORD):
        if (source / name).exists():
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
