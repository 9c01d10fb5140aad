"""Network devices that come and go while the machine runs.

insulad asks for one with the descriptor of a tap, and for the network that the guest has then. The device is put into a
free slot (slots.py), and the agent configures it as soon as it is there. A device that goes is first forgotten by the
agent, then the guest is asked to let go of it, and then the tap is closed: also if the guest does not let go. It keeps
a device without a cable in that case, whose slot stays taken.

What is asked for again is there already, or gone: insulad asks again when it was killed in between. What QEMU has
answered too late is found before the next device is put in.
"""

from __future__ import annotations

import contextlib

from insula.machine.qemu import devices
from insula.machine.shim.changes import ANSWERS, APPEARS
from insula.machine.shim.qmp import Qmp, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.machine.shim.changes import Answer, Done, MachineChanges
    from insula.machine.shim.slots import Slots

_FORGETS = 3.0
"""Seconds until the agent must have forgotten a device."""


class NetworkDevices:
    """The network devices of a machine. `network` is what the agent was told last."""

    def __init__(self, qmp: Qmp, changes: MachineChanges, slots: Slots, network: dict[str, Any]) -> None:
        self._qmp, self._changes, self._slots = qmp, changes, slots
        self.network = network

    def taken(self) -> list[int]:
        """The slots that have devices: first those of the network, in its order."""
        return self._slots.in_order(each["port"] for each in self.network["interfaces"])

    def insert(self, port: dict[str, Any], tap: int) -> None:
        """Put a device for a port, with `index`, `number`, `mac` and `mtu`, into the slot of that number, or another
        one if that is taken. QmpError."""
        if port["index"] in self._slots.ports:
            return
        if tap < 0:
            raise QmpError("the device of the port is gone")
        bus = self._slots.bus
        slot = self._slots.free([bus.first + port["number"]])
        name = devices.network_name(slot)
        self._delete(name)
        self._qmp.give(name, tap)
        self._qmp.execute("netdev_add", type="tap", id=name, fd=name)
        try:
            self._qmp.execute("device_add", **bus.network_device(slot, port["mac"], port["mtu"]))
        except QmpError:
            self._delete(name)
            raise
        self._slots.ports[port["index"]] = slot

    def _delete(self, name: str) -> None:
        """Close the tap, if there is one."""
        with contextlib.suppress(QmpError):
            self._qmp.execute("netdev_del", id=name)

    def plug(self, port: dict[str, Any], tap: int, network: dict[str, Any], done: Done) -> None:
        """Insert a device, and have the agent configure the network as soon as all of its devices are there. `done`
        gets an answer, with `error` if that was not possible."""
        try:
            with self._qmp.within(ANSWERS):
                self.insert(port, tap)
        except QmpError as error:
            done({"error": str(error)})
            return

        def configured(answer: Answer) -> None:
            tell({"error": f"the guest has not configured it: {answer['error']}"} if "error" in answer else {})

        self.network = network
        tell = self._changes.first(self._changes.begin(done), APPEARS + 1)
        self._changes.ask("ports", network, configured)

    def unplug(self, index: int, network: dict[str, Any], done: Done) -> None:
        """Have the agent forget a port, and remove its device."""
        if index not in self._slots.ports:
            done({})
            return
        tell = self._changes.begin(done)
        forgotten = self._changes.first(lambda _: self._remove(index, tell), _FORGETS)
        self.network = network
        self._changes.agent.ask("ports", network, forgotten)

    def _remove(self, index: int, done: Done) -> None:
        slot = self._slots.ports.get(index)
        if slot is None:  # it was asked for twice
            done({})
            return
        name = devices.network_name(slot)

        def end(gone: bool) -> Answer:
            self._qmp.execute("netdev_del", id=name)
            self._slots.ports.pop(index, None)
            if not gone:
                self._slots.others.add(slot)
            return {}

        self._slots.remove(name, end, done)


def only_first(network: dict[str, Any]) -> dict[str, Any]:
    """A network with the first interface alone."""
    first = network["interfaces"][:1]
    names = [each["name"] for each in first]
    routes = [each for each in network["routes"] if each["interface"] in names]
    return {"interfaces": first, "routes": routes, "tables": []}
