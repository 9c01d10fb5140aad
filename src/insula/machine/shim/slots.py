"""The slots for devices that come and go (`insula.machine.qemu.devices`), and what is in each."""

from __future__ import annotations

import contextlib
import time

from insula.machine.qemu import devices
from insula.machine.shim.changes import ANSWERS, SOON
from insula.machine.shim.qmp import Qmp, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from insula.kernel.event_loop import EventLoop
    from insula.machine.qemu.devices import HotPlugBus
    from insula.machine.shim.changes import Done

LETS_GO = 5.0
"""Seconds until the guest must have let go of a device."""


class Slots:
    """Which slots of a bus are taken: by `ports`, by their indices, by `disks`, by their names, and by `others`, which
    are network devices without a port and what was put in without QEMU's answer in time."""

    def __init__(
        self, qmp: Qmp, loop: EventLoop, at_start: Iterable[tuple[int, int | None]], bus: HotPlugBus = devices.BUS
    ) -> None:
        """`at_start` has the slots of network devices at the start, with the index of the port of each."""
        self._qmp, self._loop, self.bus = qmp, loop, bus
        self.ports: dict[int, int] = {}
        self.disks: dict[str, int] = {}
        self.others: set[int] = set()
        for slot, port in at_start:
            if port is None:
                self.others.add(slot)
            else:
                self.ports[port] = slot

    @property
    def taken(self) -> set[int]:
        return {*self.ports.values(), *self.disks.values(), *self.others}

    def in_order(self, ports: Iterable[int]) -> list[int]:
        """The slots that network devices have: first those of these ports, in this order."""
        first = [self.ports[port] for port in ports if port in self.ports]
        return [*first, *sorted({*self.ports.values(), *self.others}.difference(first))]

    def free(self, wished: Sequence[int]) -> int:
        """A slot without a device: one that is wished, or another. QmpError if there is none."""
        found = self.present()
        there = {slot for slot in self.bus.slots if {devices.network_name(slot), devices.disk_name(slot)} & found}
        self.others &= there  # a guest may let go of a device, and QEMU may answer, later than we have waited
        self.others |= there - self.taken
        for slot in (*wished, *reversed(self.bus.slots)):
            if slot not in self.taken:
                return slot
        raise QmpError("all slots of the machine are taken by devices that it does not let go of")

    def remove(
        self,
        name: str,
        end: Callable[[bool], dict[str, Any]],
        done: Done,
        closed: Callable[[], bool] = lambda: True,
    ) -> None:
        """Have the guest let go of a device. `end` is called when it has, and all of it is `closed`, or with False if
        it does not in time; what it returns is the answer, or an error of QEMU."""
        deadline = time.monotonic() + LETS_GO

        def look() -> None:
            try:
                with self._qmp.within(ANSWERS):
                    gone = name not in self.present()
                    if not (gone and closed()) and time.monotonic() < deadline:
                        self._loop.later(SOON, look)
                        return
                    answer = end(gone)
            except QmpError as error:
                answer = {"error": str(error)}
            done(answer)

        with contextlib.suppress(QmpError), self._qmp.within(ANSWERS):  # it was asked before, or is gone
            self._qmp.execute("device_del", id=name)
        look()

    def present(self) -> set[str]:
        """The devices that QEMU has, by their names."""
        return {str(each["name"]) for each in self._qmp.execute("qom-list", path="/machine/peripheral")}
