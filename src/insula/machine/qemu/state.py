"""The state of a machine's devices and processors, without its memory: written by a template, or for a snapshot, and
loaded by copies.

The migration capability `x-ignore-shared` leaves out memory that is a file (docs/system/vm-templating.rst of QEMU).
"""

from __future__ import annotations

import time

from insula.machine.shim.qmp import DEADLINE, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.machine.shim.qmp import Qmp

CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}]
DISK = 4 << 30
"""Bytes of the disk that a template believes in. A copy with another one is told so, and has work with it."""
_SILENT = {"announce-rounds": 1, "announce-initial": 100_000, "announce-max": 100_000}
"""Else the guest would tell the network where it is, with the template's MAC address, before it has its own. Now it
does that after 100 seconds. Without any round QEMU 7.2 crashes when a network device goes that the state has."""
_PAUSE = 0.0005


def save(qmp: Qmp, state: int) -> None:
    """Stop a machine, and write the state of its devices and processors to a descriptor. QmpError."""
    qmp.execute("stop")
    qmp.execute("migrate-set-capabilities", capabilities=CAPABILITIES)
    qmp.give("state", state)
    qmp.execute("migrate", uri="fd:state")
    end = time.monotonic() + DEADLINE
    while (found := qmp.execute("query-migrate").get("status")) != "completed":
        if found == "failed" or time.monotonic() > end:
            raise QmpError("the state can't be written")
        time.sleep(_PAUSE)


def load(qmp: Qmp, state: int, disk: int = DISK) -> None:
    """Load a state, in a machine that waits for one, and let it run. `disk` is the size of its own disk, unless the
    state is of a machine with a disk of that size. QmpError."""
    qmp.execute("migrate-set-capabilities", capabilities=CAPABILITIES)
    qmp.execute("migrate-set-parameters", **_SILENT)
    qmp.execute("migrate-incoming", uri=f"fd:{state}")
    end = time.monotonic() + DEADLINE
    while qmp.execute("query-status")["status"] == "inmigrate":
        if time.monotonic() > end:
            raise QmpError("the state can't be loaded")
        time.sleep(_PAUSE)
    if disk != DISK:
        qmp.execute("block_resize", **{"node-name": "disk1", "size": disk})
    qmp.execute("cont")
