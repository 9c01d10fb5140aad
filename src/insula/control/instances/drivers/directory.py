"""The directory of one instance below the root directory: what survives a reboot.

    instances/ID/log            what it printed
    instances/ID/launch.json    the last start that was begun: its number, and the life of the host it was in
    instances/ID/…              what the driver keeps there

`launch.json` is written before the instance is made, and what was made is removed only after its end was stored. So
after a crash at any point this record, what runs, and the stored status together tell what had happened. Only of an
instance that is removed when it ends the end is not stored: nobody could ask for it.
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
    """Which start was begun last, and in which life of the host (/proc/sys/kernel/random/boot_id, random(4))."""

    starts: int = msgspec.field(name="generation")  # as 0.1.0 wrote it: instances run on over an upgrade
    boot: str


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Directory:
    """The directory of one instance; what a driver keeps there is in a class of its own."""

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
        """Whether there is a record that can't be read."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            return True
        return self.record() is None and os.path.lexists(self.path / "launch.json")

    def write_record(self, record: LaunchRecord) -> None:
        records.replace(self.path / "launch.json", msgspec.json.encode(record))

    def end_of_boot(self) -> None:
        """From now on the last launch counts as one of an earlier life of the host."""
        if record := self.record():
            self.write_record(msgspec.structs.replace(record, boot=""))

    async def remove(self) -> None:
        """The directory with all that the instance left in it. Failed says what is in the way."""
        if await asyncio.to_thread(trees.remove_small, self.path):
            return
        child = await asyncio.create_subprocess_exec(*trees.command(self.path), stdin=DEVNULL, stderr=PIPE)
        assert child.stderr
        try:
            said = await child.stderr.read(_SAID)
            while await child.stderr.read(_SAID):  # there may be a complaint for each of a million files
                pass
            trees.check(await child.wait(), said)
        except asyncio.CancelledError:
            child.kill()
            raise
        except OSError as error:
            raise Failed(f"the directory {self.path} can't be removed: {error}", "remove it by hand") from None
