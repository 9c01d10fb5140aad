"""From a disk image to a sparse raw file. Blocks of zeros become holes, whatever the source has in their place.

The digest is that of the content: of the size, and of each block that is not zeros, with its offset. So it is the same
for all formats, and a large disk that is nearly empty takes little time.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final, Literal, NamedTuple, Protocol

from insula.image.disk.iso import IsoImage
from insula.image.disk.qcow2 import Qcow2Disk
from insula.image.disk.raw import RawDisk
from insula.image.limits import check_room
from insula.model.disk_images import Firmware
from insula.model.errors import Invalid
from insula.model.units import format_size

DiskFormat = Literal["raw", "qcow2", "iso"]
MAX_DISK: Final = 1 << 40
"""Bytes of a disk, zeros included."""
BLOCK: Final = 64 << 10
_BEGIN: Final = b"insula disk 1\0"
_ZEROS: Final = bytes(BLOCK)
_LOOKS: Final = 1024  # blocks between two looks at the free space


class ConvertedDisk(NamedTuple):
    """What a conversion has made: the size of the disk, the bytes that are stored of it, the digest of both, and the
    firmware that it is for. `cpu` is in seconds."""

    size: int
    stored: int
    digest: str
    firmware: Firmware
    cpu: float = 0.0


class DiskSource(Protocol):
    """A disk by offset. `size` is a whole number of sectors."""

    size: int

    def next_data(self, offset: int) -> int: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def firmware(self) -> Firmware: ...


def open_source(fd: int, kind: DiskFormat) -> DiskSource:
    """Open a disk image of this format. Invalid."""
    if kind == "qcow2":
        return Qcow2Disk(fd, MAX_DISK)
    source = IsoImage(fd) if kind == "iso" else RawDisk(fd)
    if source.size > MAX_DISK:
        raise Invalid(f"the disk has more than {format_size(MAX_DISK)}", "import a smaller disk")
    return source


def convert(source: DiskSource, target: int, most: int) -> ConvertedDisk:
    """Write a disk to the empty file `target`. Invalid if it has more than `most` bytes that are not zeros."""
    size, stored, looked = source.size, 0, 0
    hasher = hashlib.sha256(_BEGIN + size.to_bytes(8, "big"))
    os.ftruncate(target, size)
    at = _next_block(source, 0)
    while at < size:
        data = source.read(at, min(BLOCK, size - at))
        if data != _ZEROS[: len(data)]:
            stored += len(data)
            if stored > most:
                what = f"the disk has more than {format_size(most)} of data"
                raise Invalid(what, "import a smaller disk; a small file can't have much more data than it is long")
            hasher.update(at.to_bytes(8, "big"))
            hasher.update(data)
            _write(target, data, at)
        if looked % _LOOKS == 0:
            check_room(target, "importing a disk image")
        looked += 1
        at = _next_block(source, at + BLOCK)
    return ConvertedDisk(size, stored, f"sha256:{hasher.hexdigest()}", source.firmware())


def _next_block(source: DiskSource, offset: int) -> int:
    """The first block from `offset` on that may have data; the size of the disk if none has."""
    found = source.next_data(offset) if offset < source.size else source.size
    return found // BLOCK * BLOCK if found < source.size else source.size


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
