"""What an image from outside may cost: bytes, files, documents, time. All limits of the room are here.

They are counted before the work is done, and for the whole of an import: a hundred small layers may make no more than
one large layer may. How much an import may make depends on how much was received, so that a few kilobytes can't fill a
disk. The file is loaded by the extracting child process, so it imports little.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from insula.model.errors import Failed, Invalid
from insula.model.units import format_size

MAX_SIZE = 20 << 30
"""Bytes of one import: of its blobs together, of its tars together, of its files together (holes count as zeros)."""
MAX_ENTRIES = 1_000_000
"""Entries of all archives of one import."""
MAX_RATIO = 500
"""How many times larger than what was received an import may become; gzip reaches 1030 with zeros alone."""
RATIO_FLOOR = 256 << 20
"""But so many bytes it may always make."""
MAX_IMAGES = 64
"""Images in one archive."""
MAX_LAYERS = 500
"""Layers of one image: overlayfs takes no more (OVL_MAX_STACK)."""
MAX_DOCUMENT = 4 << 20
"""Bytes of a manifest, an index or a configuration: what other engines and registries allow, too."""
MAX_DOCUMENTS = 500
"""Manifests and indexes that are read of one archive."""
MAX_DEPTH = 4
"""Indexes inside of one another."""
CPU_FLOOR = 300
"""Seconds of processor time that every import has,"""
CPU_RATE = 4 << 20
"""and one more for so many bytes that were received."""
PATIENCE = 10
"""An import may take so many times its processor time: disks are slow, and others work, too."""
MEMORY = 1 << 30
"""Bytes of memory of the process that extracts."""
STALL, LEAST = 300.0, 1 << 20
"""A registry must send so many bytes (the second) in so many seconds (the first)."""
AT_ONCE, AT_ONCE_TENANT = 16, 4
"""Imports, pulls, pushes and saves at a time, in all and of one tenant; more wait."""
RESERVE, RESERVE_PART = 1 << 30, 20
"""Bytes of the disk that imports leave free; on a small disk the twentieth part of it."""


class Limits(NamedTuple):
    """What the extraction of one archive may make: `bytes` of files, `entries`, and `tar` bytes when decompressed.

    `cpu` is in seconds of processor time.
    """

    bytes: int = MAX_SIZE
    entries: int = MAX_ENTRIES
    tar: int = 2 * MAX_SIZE
    cpu: int = CPU_FLOOR


class Budget:
    """What is left of the limits of one import, which may make at most `max_size` bytes and `max_entries` files."""

    def __init__(self, max_size: int = MAX_SIZE, max_entries: int = MAX_ENTRIES) -> None:
        self.max_size = max_size
        self.entries = max_entries
        self._received = self._blobs = self._tars = self._files = 0
        self._cpu = 0.0

    def receive(self, size: int) -> None:
        """`size` bytes came from outside: the import may make more, in proportion."""
        self._received += size
        if self._received > self.max_size:
            raise Invalid(f"the image is more than {format_size(self.max_size)} large", self.hint)

    @property
    def hint(self) -> str:
        return f"all blobs of an import, or all its layers, may have {format_size(self.max_size)} together"

    @property
    def most(self) -> int:
        """Bytes that may be made of what was received."""
        return min(self.max_size, max(RATIO_FLOOR, MAX_RATIO * self._received))

    @property
    def seconds(self) -> float:
        """The processor time of the whole import."""
        return CPU_FLOOR + self._received / CPU_RATE

    @property
    def blobs(self) -> int:
        """Bytes of blobs that may still be kept."""
        return max(0, self.max_size - self._blobs)

    def keep(self, size: int) -> None:
        """A blob of `size` bytes is kept. Raises Invalid."""
        self._blobs += size
        if self._blobs > self.max_size:
            raise Invalid(f"the image is more than {format_size(self.max_size)} large", self.hint)

    def limits(self) -> Limits:
        """For the next archive: what is left. Raises Invalid if nothing is."""
        cpu = int(self.seconds - self._cpu)
        if cpu <= 0:
            raise Invalid(
                f"the image takes more than {self.seconds:.0f} seconds of processor time", "it may be made to waste it"
            )
        most = self.most
        return Limits(most - self._files, self.entries, most - self._tars, cpu)

    def spend(self, *, tar: int, files: int, entries: int, cpu: float) -> None:
        """An archive was extracted, within `limits`."""
        self._tars += tar
        self._files += files
        self.entries -= entries
        self._cpu += cpu


def check_room(fd: int, doing: str) -> None:
    """Raises Failed if the disk that has the file `fd` has less room than is left free for others."""
    found = os.fstatvfs(fd)
    blocks = found.f_bavail < min(RESERVE // found.f_frsize, found.f_blocks // RESERVE_PART)
    inodes = found.f_files and found.f_favail < found.f_files // (100 * RESERVE_PART)
    if blocks or inodes:
        raise Failed(f"the disk is full while {doing}", "free some space, for example with: insula image rm")
