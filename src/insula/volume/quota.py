"""`DiskQuota`: the protocol of drivers that limit trees of files.

Where no driver can enforce limits there is `ReservationOnly`: whoever keeps the sums that are reserved can still check
them, but the use of the disk is not limited.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from insula.model.errors import Unavailable


class DiskLimit(NamedTuple):
    """The hard limits of a tree: bytes and inodes; None is no limit."""

    space: int | None = None
    inodes: int | None = None


class DiskUsage(NamedTuple):
    """What a tree takes: bytes and inodes, those of deleted files that are still open included."""

    space: int
    inodes: int


class DiskSpace(NamedTuple):
    """The space of a file system: total and free bytes, total and free inodes; `inodes` is 0 if it has no fixed number
    of them (statvfs(3))."""

    size: int
    free: int
    inodes: int
    free_inodes: int


class DiskQuota(Protocol):
    """A driver for the trees below `directory`. Its methods are quick system calls. A tree is known by its project ID.

    `name` says what enforces the limits, and `enforced` whether anything does. `trouble` says why nothing may be
    written below `directory` now; None if it may.
    """

    name: str
    directory: Path
    enforced: bool
    trouble: str | None

    def assign(self, project: int, paths: Sequence[Path]) -> None:
        """Count these empty directories, and what will be made in them, for the project. OSError."""

    def limit(self, project: int, limit: DiskLimit) -> None:
        """Set the limits of the project. OSError."""

    def usage(self, project: int) -> DiskUsage | None:
        """What the project takes; None if nothing counts it. OSError."""

    def release(self, project: int) -> None:
        """Remove the limits of a project whose tree is gone. OSError."""

    def refutation(self) -> str | None:
        """Write past a limit, and return why that was not refused; None if it was. Blocks."""

    def close(self) -> None:
        """Close the driver. Limits stay."""


class ReservationOnly:
    """The driver where no limit can be enforced. `reason` says why."""

    name = "reservation only"
    enforced = False

    def __init__(self, directory: Path, reason: str, trouble: str | None = None) -> None:
        self.directory = directory
        self.reason = reason
        self.trouble = trouble

    def assign(self, project: int, paths: Sequence[Path]) -> None:
        self._check()

    def limit(self, project: int, limit: DiskLimit) -> None:
        self._check()

    def usage(self, project: int) -> DiskUsage | None:
        return None

    def release(self, project: int) -> None:
        pass

    def refutation(self) -> str | None:
        return self.reason

    def close(self) -> None:
        pass

    def _check(self) -> None:
        if self.trouble:
            raise Unavailable(f"the disk of instances is not there: {self.trouble}", "see `insula status`")


def disk_space(directory: Path) -> DiskSpace:
    """The space of the file system of a directory, as far as others than root may use it. OSError."""
    found = os.statvfs(directory)
    return DiskSpace(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, found.f_files, found.f_favail)
