"""The disk of a machine: a raw sparse file with an ext4, which has what the instance writes.

It is made before the first start, and only grows. What the guest deletes it gives back (discard).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from insula.kernel import ext4
from insula.machine.blank import BlankDisks
from insula.machine.qemu.state import DISK
from insula.model.views import DiskView

SIZE: Final = DISK
"""Bytes of a disk without a limit of its own; it takes what is written, and less than a MiB at first."""
LEAST: Final = 16 << 20


def ensure(path: Path, size: int, blank: BlankDisks) -> None:
    """Make the disk, complete or not at all, unless it is there; then it grows to that size at least, and the guest has
    its file system follow. Failed, OSError."""
    if not path.exists():
        blank.make(path, size)
    elif path.stat().st_size < size:
        os.truncate(path, size)


def grows(path: Path) -> bool:
    """Whether the file system on a disk, which its guest may have damaged, seems to be smaller than that. OSError."""
    try:
        return ext4.missing(str(path)) > 0
    except ValueError:
        return False


def view(paths: Iterable[Path]) -> DiskView:
    """What disks take of the host's, and may take together, which is their size. Those that are not there are left out.
    Blocks. OSError."""
    found = [path.stat() for path in paths if path.exists()]
    used, limit = sum(each.st_blocks * 512 for each in found), sum(each.st_size for each in found)
    return DiskView(used=used, limit=limit, inodes=None, inodes_limit=None, enforced=True)
