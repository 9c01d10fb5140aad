"""CDs that come and go while the machine runs: its drives stay.

insulad gives the descriptor of a file. A CD is taken out also if the system has locked the drive, as a person may do
who has a paper clip.
"""

from __future__ import annotations

import contextlib

from insula.machine.qemu.devices import CD_SET
from insula.machine.shim.changes import ANSWERS
from insula.machine.shim.qmp import Qmp, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_UNSURE = ""
"""The name of what is in a drive while that is being changed, and after a change that has failed."""


class Cds:
    """The CDs in the drives of a machine, by their names; None if a drive is empty."""

    def __init__(self, qmp: Qmp, present: Sequence[str | None]) -> None:
        self._qmp, self._present = qmp, [*present]

    def change(self, drive: int, name: str | None, file: int) -> None:
        """Have another CD in a drive, or none. QmpError: then it is to be asked for again, or for what was there."""
        if not 0 <= drive < len(self._present):
            raise QmpError("the machine was started without that drive")
        if self._present[drive] == name:
            return
        self._present[drive] = _UNSURE
        with self._qmp.within(ANSWERS):
            self._remove(drive)
            if name is not None:
                self._insert(drive, file)
        self._present[drive] = name

    def _remove(self, drive: int) -> None:
        """Take out what is in a drive, and close its file."""
        device = _device(drive)
        self._qmp.execute("blockdev-open-tray", id=device, force=True)
        self._qmp.execute("blockdev-remove-medium", id=device)
        self._close(drive)

    def _insert(self, drive: int, file: int) -> None:
        """Put a CD into a drive, whose tray is open."""
        device, number = _device(drive), CD_SET + drive
        where = {"driver": "file", "filename": f"/dev/fdset/{number}", "locking": "off"}
        self._qmp.add(number, file)
        try:
            for node, content in ((f"{device}-file", where), (device, {"driver": "raw", "file": f"{device}-file"})):
                self._qmp.execute("blockdev-add", **{"node-name": node, "read-only": True}, **content)
            self._qmp.execute("blockdev-insert-medium", **{"id": device, "node-name": device})
            self._qmp.execute("blockdev-close-tray", id=device)
        except QmpError:
            self._close(drive)
            raise

    def _close(self, drive: int) -> None:
        """Close the file of a CD, as far as it was opened: its block nodes, and the descriptor."""
        device = _device(drive)
        for node in (device, f"{device}-file"):
            with contextlib.suppress(QmpError):
                self._qmp.execute("blockdev-del", **{"node-name": node})
        with contextlib.suppress(QmpError):
            self._qmp.execute("remove-fd", **{"fdset-id": CD_SET + drive})


def _device(drive: int) -> str:
    """The name of a drive, and of the block node of the CD in it."""
    return f"cdrom{drive}"
