"""The pages of memory that the zygote writes to for a launch, copied ahead.

fork(2) shares the parent's pages with the child. The first write to each page afterwards, by either of them, is a page
fault that copies it. A launch writes to some 250 pages of the zygote, and each launch is followed by a fork, of the
next warm container: so each would have to copy them again. MADV_POPULATE_WRITE (madvise(2), Linux 5.14) copies them
while the zygote is idle. Processor time of the zygote from "create" to the end of the container: 4.0 ms without it, 3.4
with it (medians of 55 launches each, in turns, on a machine with other load).

/proc/self/pagemap tells which pages these are (the kernel's admin-guide/mm/pagemap): those that only this process maps.
While another process still shares the pages of an earlier fork, that is what was written to since then.
"""

from __future__ import annotations

import os

from insula.kernel import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PRESENT, _FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56  # bits of an entry of pagemap
_LEARN_EVERY = 64  # launches
_MOST = 1024  # pages; if more are written to, the rest is not copied


class WorkingSet:
    """The working set of this process. Call `launched` and `forked` after each; `copy` when the process is idle."""

    def __init__(self) -> None:
        self.is_shared = False  # since a fork
        self._ranges: list[tuple[int, int]] = []  # address and length
        self._launches = 0
        self._learning = False  # until the next launch: nothing is copied, so that its writes can be seen

    def launched(self) -> None:
        """Take note of a launch, before the next fork."""
        if self._learning:
            found = list(_exclusive())
            self._learning = sum(length for _, length in found) > _MOST * _PAGE
            self._ranges = [] if self._learning else found
        if self._launches % _LEARN_EVERY == 0:
            self._learning = True
        self._launches += 1

    def forked(self) -> None:
        """Take note of a fork."""
        self.is_shared = bool(self._ranges) and not self._learning

    def copy(self) -> None:
        """Copy the pages of the set that are still shared. Nothing happens on a kernel that can't."""
        self.is_shared = False
        try:
            for address, length in self._ranges:
                syscalls.madvise(address, length, syscalls.MADV_POPULATE_WRITE)
        except OSError:  # EINVAL before Linux 5.14, ENOMEM for memory that was given back meanwhile
            self._ranges = []


def _exclusive() -> Iterator[tuple[int, int]]:
    """Address and length of runs of anonymous pages that only this process maps."""
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in maps.readlines():
            bounds, mode, _ = line.split(" ", 2)
            if not mode.startswith("rw-p"):
                continue
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            entries = os.pread(pagemap.fileno(), (end - start) // _PAGE * 8, start // _PAGE * 8)
            yield from _runs(start, memoryview(entries).cast("Q"))


def _runs(start: int, entries: memoryview) -> Iterator[tuple[int, int]]:
    first = -1
    for number, entry in enumerate([*entries, 0]):
        ours = bool(entry & _PRESENT and entry & _EXCLUSIVE and not entry & _FILE)
        if ours and first < 0:
            first = number
        elif first >= 0 and not ours:
            yield start + first * _PAGE, (number - first) * _PAGE
            first = -1
