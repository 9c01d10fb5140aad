"""A machine that grows while it runs: its disk, its memory, and its processors.

insulad asks for a size, and gets what the machine has then. What it has already is left as it is, so that it may be
asked for again.

    disk        QEMU makes its file larger and tells the guest, whose agent has the file system follow
    memory      a module (DIMM) with memory of its own is plugged in, in steps of `BLOCK` MiB. It is never taken out
                again. A balloon would punch holes into the template that other machines are copies of
    processors  are plugged in up to what the machine has places for; the agent has so many of them run
"""

from __future__ import annotations

from insula.machine.qemu import devices
from insula.machine.shim.changes import ANSWERS, APPEARS
from insula.machine.shim.qmp import Qmp, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.machine.shim.changes import Answer, Done, MachineChanges


class MachineSize:
    """What a machine has: bytes of its disk, whose node in QEMU is `node`; MiB of memory at its start, and of modules
    plugged in since; processors, and how many of them run. Without an agent only the disk grows."""

    def __init__(self, qmp: Qmp, plan: dict[str, Any], node: str) -> None:
        self._qmp, self._node = qmp, node
        self.disk: int = plan["disk"]
        self.memory: int = plan["memory"]
        self.modules: list[int] = list(plan["modules"])
        self.at_start: int = plan["cpus"]
        self.cpus = self.running = self.at_start + int(plan["plugged"])
        self.missing = 0  # bytes that the file system is smaller than the disk

    def answer(self) -> dict[str, Any]:
        """What the machine has."""
        memory = self.memory + sum(self.modules)
        return {"disk": self.disk, "base": self.memory, "memory": memory, "cpus": self.running, "missing": self.missing}

    def described(self) -> dict[str, Any]:
        """What a machine that goes on from its memory must have."""
        return {
            "memory": self.memory,
            "modules": self.modules,
            "cpus": self.at_start,
            "plugged": self.cpus - self.at_start,
        }

    def grow_disk(self, size: int) -> None:
        """Have the disk be so large at least. QmpError."""
        if size > self.disk:
            with self._qmp.within(ANSWERS):
                self._qmp.execute("block_resize", **{"node-name": self._node, "size": size})
            self.disk = size


class GrowingMachine(MachineSize):
    """A machine with the agent."""

    def __init__(self, qmp: Qmp, plan: dict[str, Any], node: str, changes: MachineChanges) -> None:
        super().__init__(qmp, plan, node)
        self._changes = changes
        self._told = self.disk, self.running  # what the agent has done when it has answered

    def grow(self, wanted: dict[str, Any], done: Done) -> None:
        """Give the machine `disk` bytes, `memory` MiB and `cpus`, as far as that is possible; `done` gets `answer`, or
        an `error` of QEMU."""
        try:
            self.grow_disk(wanted["disk"])
            with self._qmp.within(ANSWERS):
                self._plug_memory(wanted["memory"])
                self._plug_processors(wanted["cpus"])
        except QmpError as error:
            done({"error": str(error)})
            return
        cpus = min(wanted["cpus"], self.cpus)
        if (self.disk, cpus) == self._told and not self.missing:
            done(self.answer())
        else:
            self._tell(cpus, done)

    def _plug_memory(self, wanted: int) -> None:
        """Plug in a module with what is missing, in whole blocks."""
        present = self._qmp.execute("query-memory-devices")
        self.modules = [int(each["data"]["size"]) >> 20 for each in present]  # one may have been answered too late
        most = min(wanted, devices.MOST_MEMORY) - self.memory - sum(self.modules)
        size, number = most // devices.BLOCK * devices.BLOCK, len(self.modules)
        if size <= 0 or number >= devices.MODULES:
            return
        self._qmp.execute("object-add", **devices.memory(number, size))
        try:
            self._qmp.execute("device_add", **devices.module(number))
        except QmpError:
            self._qmp.execute("object-del", id=devices.memory(number, size)["id"])
            raise
        self.modules.append(size)

    def _plug_processors(self, wanted: int) -> None:
        places = self._qmp.execute("query-hotpluggable-cpus")
        self.cpus = sum("qom-path" in each for each in places)
        free = [each for each in places if "qom-path" not in each]
        for each in sorted(free, key=lambda each: int(each["props"]["core-id"]))[: max(0, wanted - self.cpus)]:
            core = each["props"]["core-id"]
            self._qmp.execute("device_add", driver=each["type"], id=f"cpu{core}", **each["props"])
            self.cpus += 1

    def _tell(self, cpus: int, done: Done) -> None:
        """Have the agent let so many processors run, and the file system grow."""
        finish = self._changes.first(self._changes.begin(lambda _: done(self.answer())), 2 * APPEARS)

        def answered(answer: Answer) -> None:
            if "error" not in answer:
                self.running, self.missing = int(answer["cpus"]), max(0, int(answer["missing"]))
                self._told = self.disk, cpus
            finish(answer)

        self._changes.ask("resize", {"cpus": cpus}, answered)
