"""A machine that comes from another host while it runs; the other side is departure.py there.

QEMU was started without an agent to talk to, and waits. insulad gives two descriptors: a listening socket to whose
first connections the disks come, and one from which the memory comes. Messages on the same connection:

    QEMU waits for disks and memory          → receiving
    all is there, and stands still           → arrived
                                             ← own: sessions of the agent there. The machine runs here from now on
    the machine goes on, with the time, and its frames are read here

The machine stands still until it is told `own`: it may yet go on at the other host. What was killed in between is told
so on another connection by the next insulad, which knows whose the machine is.
"""

from __future__ import annotations

import os

from insula.machine.qemu import migration
from insula.machine.shim.qmp import Qmp, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from insula.kernel.event_loop import EventLoop
    from insula.machine.shim.connection import ShimConnection

_SOON = 0.002


class Arrival:
    """Receives a machine, whose disks have these `nodes`. `failed` is called with the reason if it can't be
    received."""

    def __init__(self, loop: EventLoop, qmp: Qmp, nodes: Sequence[str], failed: Callable[[str], object]) -> None:
        self._loop, self._qmp, self._nodes, self._failed = loop, qmp, nodes, failed
        self._begun = False
        self.arrived = False

    def begin(self, connection: ShimConnection, descriptors: list[int]) -> None:
        """Have QEMU receive from these descriptors, which are closed; only once."""
        try:
            if self._begun or len(descriptors) != 2:
                raise QmpError("it is received only once, by two descriptors")
            self._begun = True
            migration.receive(self._qmp, self._nodes, *descriptors)
        except QmpError as error:
            connection.tell({"error": str(error)})
            self._failed(str(error))
            return
        finally:
            for fd in descriptors:
                os.close(fd)
        connection.tell({"receiving": True})
        self._look(connection)

    def _look(self, connection: ShimConnection) -> None:
        try:
            if not migration.is_received(self._qmp):
                self._loop.later(_SOON, lambda: self._look(connection))
                return
            migration.close_disks(self._qmp, self._nodes)
        except QmpError as error:
            self._failed(str(error))
            return
        self.arrived = True
        connection.tell({"arrived": True})
