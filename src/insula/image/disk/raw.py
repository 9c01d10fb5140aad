"""A raw disk image: byte for byte what the disk has. Holes of the file are zeros."""

from __future__ import annotations

import errno
import os
from typing import Final

from insula.model.disk_images import Firmware
from insula.model.errors import Invalid

SECTOR: Final = 512
_OTHERS: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk Descriptor", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)
"""Beginnings of files of other formats: offset, bytes, name."""


class RawDisk:
    """A raw disk image. `size` is a whole number of sectors; beyond the end of the file are zeros. Invalid if the file
    begins as one of another format does: then the format that was given is a mistake, or a trick."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = os.fstat(fd).st_size
        self.size = -(-self._end // SECTOR) * SECTOR
        if not self.size:
            raise Invalid("the disk image is empty", "give a disk image")
        head = os.pread(fd, SECTOR, 0)
        for offset, begin, name in _OTHERS:
            if head[offset:].startswith(begin):
                what = f"the disk image is said to be raw, and begins as one of format {name} does"
                raise Invalid(what, "give its format with --format; other ones: qemu-img convert -O qcow2")

    def next_data(self, offset: int) -> int:
        """Return the first offset from `offset` on that may have something else than zeros; `size` if none has."""
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return self.size
            raise

    def read(self, offset: int, length: int) -> bytes:
        """Return what the disk has there, inside of its size."""
        data = os.pread(self._fd, length, offset)
        return data + bytes(length - len(data))

    def firmware(self) -> Firmware:
        """The firmware that the first sector is for."""
        return firmware_of(self.read(0, SECTOR))


def firmware_of(sector: bytes) -> Firmware:
    """The firmware that a first sector is for: a BIOS executes it if it has the signature, so UEFI is for what has no
    code there."""
    return "bios" if sector[510:512] == b"\x55\xaa" and sector[0] else "uefi"
