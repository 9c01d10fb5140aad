"""Disks that come and go while the machine runs.

insulad gives the descriptor of a file; with `mount` the agent mounts its file system there. A disk that goes is first
unmounted, which is refused while a program uses it, and then the guest has to let go of its device. Until it has, the
disk stays: QEMU would lose what it still writes.
"""

from __future__ import annotations

import contextlib

from insula.machine.qemu import devices
from insula.machine.shim.changes import ANSWERS, APPEARS, SILENT
from insula.machine.shim.qmp import Qmp, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.machine.shim.changes import Answer, Done, MachineChanges
    from insula.machine.shim.slots import Slots

_UNMOUNTS = 15.0
"""Seconds until the agent must have unmounted a disk: what was written to it is put there before."""


class FurtherDisks:
    """The further disks of a machine, by their names in `slots`, and where they are mounted."""

    def __init__(
        self, qmp: Qmp, changes: MachineChanges, slots: Slots, at_start: dict[str, tuple[int, str | None]]
    ) -> None:
        """`at_start` has the disks that QEMU was started with: the slot of each, 0 if it can't go while the machine
        runs, and where it is mounted."""
        self._qmp, self._changes, self._slots = qmp, changes, slots
        self._mounts: dict[str, str | None] = {}
        self._fixed: list[str] = []
        for name, (slot, mount) in at_start.items():
            self._mounts[name] = mount
            if slot:
                slots.disks[name] = slot
            else:
                self._fixed.append(name)

    @property
    def there(self) -> dict[str, int]:
        """The slots of all disks by their names; 0 for those that can't go."""
        return {**dict.fromkeys(self._fixed, 0), **self._slots.disks}

    @property
    def nodes(self) -> list[str]:
        """The block nodes of those that can go, in the order of their names."""
        return [devices.disk_name(slot) for _, slot in sorted(self._slots.disks.items())]

    def insert(self, name: str, mount: str | None, file: int) -> None:
        """Put a disk into a free slot. QmpError."""
        if name in self._slots.disks:
            if devices.disk_name(self._slots.disks[name]) in self._slots.present():
                return
            self._forget(name)  # the guest has let go of it, later than it was asked to or by itself
        slot = self._slots.free(self._slots.bus.for_disks)
        node = devices.disk_name(slot)
        with self._qmp.within(ANSWERS):
            self._close(slot)  # what QEMU had in use still when a device went
            self._qmp.add(devices.DISK_SET + slot, file)
            try:
                where = {"driver": "file", "filename": f"/dev/fdset/{devices.DISK_SET + slot}", "locking": "off"}
                self._qmp.execute("blockdev-add", discard="unmap", **{"node-name": f"{node}-file"}, **where)
                content = {"driver": "raw", "file": f"{node}-file"}
                self._qmp.execute("blockdev-add", discard="unmap", **{"node-name": node}, **content)
                self._qmp.execute("device_add", **self._slots.bus.disk(slot, name))
            except QmpError:
                self._close(slot)
                raise
        self._slots.disks[name], self._mounts[name] = slot, mount

    def forget_gone(self) -> None:
        """Close the files of disks that the guest has let go of by itself. QmpError; also if there is a disk which QEMU
        took, and answered that too late: nobody knows what it is."""
        with self._qmp.within(ANSWERS):
            found = self._slots.present()
            for name, slot in list(self._slots.disks.items()):
                if devices.disk_name(slot) not in found:
                    self._forget(name)
        known = {devices.disk_name(slot) for slot in self._slots.disks.values()}
        if found.intersection(map(devices.disk_name, self._slots.bus.slots)) - known:
            raise QmpError("it has a disk that QEMU has answered too late for, until its next start")

    def attach(self, name: str, mount: str | None, file: int, done: Done) -> None:
        """Insert a disk, and have the agent find and mount it; `done` gets an answer, with `error` if that failed."""
        if name in self._fixed:
            done({})
            return
        try:
            self.insert(name, mount, file)
        except QmpError as error:
            done({"error": str(error)})
            return

        def mounted(answer: Answer) -> None:
            tell({"error": f"the guest can't mount it: {answer['error']}"} if "error" in answer else {})

        tell = self._changes.first(self._changes.begin(done), APPEARS + 1)
        self._changes.ask("mount", {"disk": name, "path": mount}, mounted)

    def detach(self, name: str, done: Done) -> None:
        """Have the agent unmount a disk, and the guest let go of it."""
        if name in self._fixed:
            done({"error": "it can't let go of the disk while it runs"})
            return
        if name not in self._slots.disks:
            done({})
            return
        tell = self._changes.begin(done)

        def unmounted(answer: Answer) -> None:
            if answer is SILENT:
                tell(answer)
            elif "error" in answer:
                tell({"error": f"the disk is in use: {answer['error']}"})
            else:
                self._remove(name, tell)

        self._changes.agent.ask("unmount", {"disk": name}, self._changes.first(unmounted, _UNMOUNTS))

    def _remove(self, name: str, done: Done) -> None:
        if name not in self._slots.disks:  # it was asked for twice
            done({})
            return

        def end(gone: bool) -> Answer:
            if not gone:  # it is used again
                self._changes.agent.ask("mount", {"disk": name, "path": self._mounts.get(name)}, lambda _: None)
                return {"error": "the guest does not let go of it"}
            self._forget(name)
            return {}

        slot = self._slots.disks[name]
        self._slots.remove(devices.disk_name(slot), end, done, lambda: self._close(slot))

    def _forget(self, name: str) -> None:
        """Close the file of a disk whose device is gone, unless that was done."""
        self._mounts.pop(name, None)
        if (slot := self._slots.disks.pop(name, None)) is not None:
            self._close(slot)

    def _close(self, slot: int) -> bool:
        """Close the file of a disk: its block nodes, and the descriptor, as far as they were made. Return whether that
        is done: QEMU has them in use for a moment after a device is gone (RCU). QmpError."""
        for each in self._nodes_of(slot):
            with contextlib.suppress(QmpError):
                self._qmp.execute("blockdev-del", **{"node-name": each})
        with contextlib.suppress(QmpError):
            self._qmp.execute("remove-fd", **{"fdset-id": devices.DISK_SET + slot})
        return not self._nodes_of(slot)

    def _nodes_of(self, slot: int) -> list[str]:
        """The block nodes of a disk that there are: first the upper one. QmpError."""
        there = {each["node-name"] for each in self._qmp.execute("query-named-block-nodes", flat=True)}
        node = devices.disk_name(slot)
        return [each for each in (node, f"{node}-file") if each in there]
