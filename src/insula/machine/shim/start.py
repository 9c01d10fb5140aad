"""The start of QEMU: the first thing that the shim does, before it imports what it serves QEMU with.

QEMU needs some time to be linked and to make its devices, and Python as long to import modules. They do it side by
side. So this module imports as little as it can.
"""

from __future__ import annotations

import io
import os
import time

from insula.machine.shim.common import FAILED
from insula.model.cpython import loads, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PLAN = 3
AGENT, QMP = 100, 101
"""Descriptors in QEMU: its ends of the sockets to the agent, and for commands to itself."""
_MOST = 1 << 20


class StartedQemu:
    """QEMU, which was started as process `pid`, our ends of the sockets to it, and of its standard error."""

    def __init__(self, plan: dict[str, Any]) -> None:
        """Start it. OSError."""
        self.plan, self.began = plan, time.monotonic()
        self.agent, of_agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.qmp, of_qmp = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.errors, of_errors = os.pipe()
        for fd in plan["descriptors"]:
            os.set_inheritable(fd, True)
        kept = [*(each["tap"] for each in plan.get("inserted", ())), *(each["file"] for each in plan.get("disks", ()))]
        for fd in kept:  # it gets a copy when it is asked to take the device
            os.set_inheritable(fd, False)
        empty = () if "disk_machine" in plan else ((os.POSIX_SPAWN_OPEN, 0, "/dev/null", 0, 0),)  # else its console
        actions = [
            *empty,
            (os.POSIX_SPAWN_DUP2, of_agent.fileno(), AGENT),
            (os.POSIX_SPAWN_DUP2, of_qmp.fileno(), QMP),
            (os.POSIX_SPAWN_DUP2, of_errors, 2),
        ]
        self.pid = os.posix_spawn(plan["command"][0], plan["command"], {}, file_actions=actions)
        for fd in plan["descriptors"]:
            os.close(fd)
        of_agent.close()
        of_qmp.close()
        os.close(of_errors)


class KeptGuest:
    """A guest that a hypervisor keeps, which was started before. The descriptor `channel` of the plan is its console,
    on which the agent talks."""

    pid = -1

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.began = plan, time.monotonic()
        self.agent = io.FileIO(plan["channel"], "r+")


def start() -> StartedQemu | KeptGuest:
    """Start QEMU as the plan says, unless that has a channel; if that fails, end this process."""
    plan = loads(os.read(PLAN, _MOST))
    os.close(PLAN)
    if "channel" in plan:
        return KeptGuest(plan)
    try:
        return StartedQemu(plan)
    except OSError as error:
        os.write(2, f"the machine can't be started: {error}\n".encode())
        os._exit(FAILED)
