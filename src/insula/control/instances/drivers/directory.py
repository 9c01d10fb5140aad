"""The directory of an instance below the root directory. It survives a reboot.

    instances/ID/log            the output
    instances/ID/launch.json    the last start: its number, and the boot ID of the host
    instances/ID/…              files of the driver

`launch.json` is written before the instance is created, and its remains are discarded only after its exit was stored.
So after a crash at any point this record, the state of the host and the stored status together say what had happened.
The exit of an instance that is removed when it ends is not stored, since nobody could ask for it.
"""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import msgspec

from insula.kernel import records, trees
from insula.model.errors import Failed
from insula.model.objects import Struct

_SAID = 1 << 16


class LaunchRecord(Struct, kw_only=True):
    """The number of the last start, and the host's boot ID then (/proc/sys/kernel/random/boot_id, random(4))."""

    starts: int = msgspec.field(name="generation")  # the name in 0.1.0, whose instances run on over an upgrade
    boot: str


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Directory:
    """The directory of one instance. Drivers derive a class for their own files."""

    def __init__(self, root: Path, instance_id: str) -> None:
        self.path = root / instance_id
        self.log = self.path / "log"

    def record(self) -> LaunchRecord | None:
        """The record; None if there is none, or if it is damaged."""
        try:
            return msgspec.json.decode(records.read(self.path / "launch.json"), type=LaunchRecord)
        except (OSError, msgspec.DecodeError, UnicodeError, RecursionError):
            return None

    def is_damaged(self) -> bool:
        """Whether there is a record and it can't be read."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            return True
        return self.record() is None and os.path.lexists(self.path / "launch.json")

    def write_record(self, record: LaunchRecord) -> None:
        records.replace(self.path / "launch.json", msgspec.json.encode(record))

    def end_of_boot(self) -> None:
        """Mark the last start as one before the last boot of the host."""
        if record := self.record():
            self.write_record(msgspec.structs.replace(record, boot=""))

    async def remove(self) -> None:
        """Remove the directory with all of its files. Failed says why that is not possible."""
        await remove_tree(self.path)


async def remove_tree(path: Path) -> None:
    """Remove the directory at `path` with all of its files, however many. Failed says why that is not possible."""
    if await asyncio.to_thread(trees.remove_small, path):
        return
    child = await asyncio.create_subprocess_exec(*trees.command(path), stdin=DEVNULL, stderr=PIPE)
    assert child.stderr
    try:
        said = await child.stderr.read(_SAID)
        while await child.stderr.read(_SAID):  # there may be a message for each of a million files
            pass
        trees.check(await child.wait(), said)
    except asyncio.CancelledError:
        child.kill()
        raise
    except OSError as error:
        raise Failed(f"the directory {path} can't be removed: {error}", "remove it by hand") from None
