"""The image of a CD or DVD (ISO 9660, ECMA-119), as installers of operating systems are distributed: byte for byte what
is on the medium. What starts it is told by its boot catalog (El Torito, Bootable CD-ROM Format Specification).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Final

from insula.image.disk.raw import RawDisk
from insula.model.disk_images import Firmware
from insula.model.errors import Invalid
from insula.model.units import format_size

BLOCK: Final = 2048
_VOLUME: Final = b"\1CD001\1"
_BOOT: Final = b"\0CD001\1EL TORITO SPECIFICATION"
_BIOS, _UEFI, _BOOTABLE = 0, 0xEF, 0x88
_HEADERS: Final = (0x90, 0x91)  # of a section of the catalog, and of the last one


class IsoImage(RawDisk):
    """An ISO image. `size` is a whole number of blocks. Invalid if it is none, or if its end is missing."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.size = -(-self._end // BLOCK) * BLOCK
        volume = self._block(16)
        if not volume.startswith(_VOLUME):
            raise Invalid("the file is no ISO 9660 image", "give its format with --format raw or qcow2 if it is a disk")
        (blocks,), (size,) = struct.unpack_from("<I", volume, 80), struct.unpack_from("<H", volume, 128)
        if size != BLOCK or blocks * BLOCK > self._end:
            has, needs = format_size(self._end), format_size(blocks * BLOCK)
            raise Invalid(f"the ISO image is cut off: it has {has}, and needs {needs}", "fetch it again")

    def firmware(self) -> Firmware:
        """UEFI if it starts that alone, else a BIOS."""
        found = {*self._platforms()}
        return "uefi" if _UEFI in found and _BIOS not in found else "bios"

    def _platforms(self) -> Iterator[int]:
        """The platforms of the entries of the boot catalog that boot something."""
        record = self._block(17)
        if not record.startswith(_BOOT):
            return
        catalog = self._block(struct.unpack_from("<I", record, 71)[0])
        platform = catalog[1]
        for at in range(32, BLOCK, 32):
            if catalog[at] in _HEADERS:
                platform = catalog[at + 1]
            elif catalog[at] == _BOOTABLE:
                yield platform

    def _block(self, number: int) -> bytes:
        """A block; beyond the end are zeros."""
        return os.pread(self._fd, BLOCK, number * BLOCK).ljust(BLOCK, b"\0")
