"""Limits for images from outside: bytes, files, documents and time.

They are checked before the work is done, and apply to a whole import: a hundred small layers may have no more than one
large layer. The extracted size is limited relative to the received size, so that a few kilobytes can't fill a disk. The
extracting child process loads this file, so it imports little.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from insula.model.errors import Failed, Invalid
from insula.model.units import format_size

MAX_SIZE = 20 << 30
"""Bytes of one import, for the sums of its blobs, of its tars, and of its files (holes count as zeros)."""
MAX_ENTRIES = 1_000_000
"""Entries of all archives of one import."""
MAX_RATIO = 500
"""The maximum ratio of extracted to received bytes; gzip reaches 1030 with zeros only."""
RATIO_FLOOR = 256 << 20
"""Bytes that an import may always extract."""
MAX_IMAGES = 64
"""Images in one archive."""
MAX_LAYERS = 500
"""Layers of one image, limited by overlayfs (OVL_MAX_STACK)."""
MAX_DOCUMENT = 4 << 20
"""Bytes of a manifest, an index or a configuration, as in other engines and registries."""
MAX_DOCUMENTS = 500
"""Manifests and indexes that are read from one archive."""
MAX_DEPTH = 4
"""The depth of nested indexes."""
CPU_FLOOR = 300
"""Seconds of processor time for every import."""
CPU_RATE = 4 << 20
"""Received bytes for each further second of processor time."""
PATIENCE = 10
"""The maximum ratio of elapsed time to processor time: disks are slow, and the host may be busy."""
MEMORY = 1 << 30
"""Bytes of memory of the process that extracts."""
STALL, LEAST = 300.0, 1 << 20
"""The minimum speed of a registry: (seconds, bytes in that time)."""
AT_ONCE_TENANT, AT_ONCE_MORE, AT_ONCE = 4, 12, 64
"""Concurrent imports, pulls, pushes and saves: of one tenant, of all tenants beyond the first one of each, and in all.
Further ones wait."""
EXTRACTIONS = 16
"""Concurrent extractions: they are bounded in time, pulls are bounded by the speed of a registry only."""
RESERVE, RESERVE_PART = 1 << 30, 20
"""Bytes of the disk that imports leave free; at most a twentieth of the disk."""


class ExtractionLimits(NamedTuple):
    """The limits of the extraction of one archive: `bytes` of files, `entries`, and `tar` bytes when decompressed.

    `cpu` is in seconds of processor time.
    """

    bytes: int = MAX_SIZE
    entries: int = MAX_ENTRIES
    tar: int = 2 * MAX_SIZE
    cpu: int = CPU_FLOOR


class Budget:
    """The remaining limits of one import, which may have at most `max_size` bytes and `max_entries` files."""

    def __init__(self, max_size: int = MAX_SIZE, max_entries: int = MAX_ENTRIES) -> None:
        self.max_size = max_size
        self.entries = max_entries
        self._received = self._blobs = self._tars = self._files = 0
        self._cpu = 0.0

    def receive(self, size: int, *, sparse: bool = False) -> None:
        """Record `size` received bytes, which raises the limits in proportion. Invalid if they are too many, unless
        they are `sparse`: of these only what is no zero counts, when it is stored."""
        self._received += size
        if self._received > self.max_size and not sparse:
            raise Invalid(f"the image is more than {format_size(self.max_size)} large", self.hint)

    @property
    def hint(self) -> str:
        return f"all blobs of an import, or all its layers, may have {format_size(self.max_size)} together"

    @property
    def most(self) -> int:
        """Return the bytes that may be extracted from the bytes received so far."""
        return min(self.max_size, max(RATIO_FLOOR, MAX_RATIO * self._received))

    @property
    def seconds(self) -> float:
        """Return the processor time for the whole import."""
        return CPU_FLOOR + self._received / CPU_RATE

    @property
    def blobs(self) -> int:
        """Return the bytes of blobs that may still be stored."""
        return max(0, self.max_size - self._blobs)

    def keep(self, size: int) -> None:
        """Record a stored blob of `size` bytes. Invalid if it exceeds the limit."""
        self._blobs += size
        if self._blobs > self.max_size:
            raise Invalid(f"the image is more than {format_size(self.max_size)} large", self.hint)

    def limits(self) -> ExtractionLimits:
        """Return the limits for the next archive. Invalid if nothing is left."""
        cpu = int(self.seconds - self._cpu)
        if cpu <= 0:
            raise Invalid(
                f"the image takes more than {self.seconds:.0f} seconds of processor time", "it may be hostile"
            )
        most = self.most
        return ExtractionLimits(most - self._files, self.entries, most - self._tars, cpu)

    def spend(self, *, tar: int, files: int, entries: int, cpu: float) -> None:
        """Record the extraction of an archive."""
        self._tars += tar
        self._files += files
        self.entries -= entries
        self._cpu += cpu


def check_room(fd: int, doing: str) -> None:
    """Raise Failed if the disk of the file `fd` has less free space than imports must leave."""
    found = os.fstatvfs(fd)
    blocks = found.f_bavail < min(RESERVE // found.f_frsize, found.f_blocks // RESERVE_PART)
    inodes = found.f_files and found.f_favail < found.f_files // (100 * RESERVE_PART)
    if blocks or inodes:
        raise Failed(f"the disk is full while {doing}", "free some space, for example with: insula image rm")
