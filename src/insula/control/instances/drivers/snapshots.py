"""`SnapshotFiles`: the part of a driver that keeps snapshots of instances, and makes copies of those that run.

A snapshot is known by the ID of its instance and its own. Its files are in the instance's directory, and go with it.
Each method leaves all of a change or nothing: what is there of a change that a crash has interrupted is no snapshot,
and is removed by `sweep`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from insula.model.objects import Instance, Tenant


class Taken(NamedTuple):
    """A snapshot that was made: the bytes that its files take, and the seconds that the instance stood still."""

    size: int
    stopped: float = 0.0


class SnapshotFiles(Protocol):
    async def most(self, instance: Instance, *, memory: bool) -> int:
        """The bytes that the files of a snapshot would take now, at most."""

    async def take(self, instance: Instance, snapshot_id: str, *, memory: bool, running: bool) -> Taken:
        """Make a snapshot of the disk, and of the memory at the same moment if that is asked for. One that is not
        `running` can't begin to run meanwhile. Failed, NotFound if it ends meanwhile."""

    async def remove(self, instance_id: str, snapshot_id: str) -> None:
        """Remove a snapshot; nothing happens if it is not there. OSError."""

    async def check(self, instance: Instance, snapshot_id: str) -> None:
        """Check that the instance, as it is wanted, can go on from a snapshot. Conflict; Failed if parts of it are
        missing or of another moment."""

    async def restore(self, instance: Instance, snapshot_id: str) -> None:
        """Have the instance, which does not run, begin with this snapshot when it is started next. Failed, OSError."""

    async def take_for_copies(self, instance: Instance) -> tuple[str, Taken]:
        """Make a snapshot with memory for copies of an instance that runs, and return its ID. Failed, NotFound."""

    async def place(self, instance: Instance, copies: str, tenant: Tenant, child_id: str) -> None:
        """Have a new instance, of which nothing is there, begin with what `take_for_copies` has made. OSError."""

    async def remove_copies(self, instance_id: str, copies: str) -> None:
        """Remove what `take_for_copies` has made. Instances that were placed keep their own. OSError."""

    async def sweep(self, instance_id: str, kept: Collection[str]) -> None:
        """Remove everything of an instance's snapshots but those that are kept. OSError."""
