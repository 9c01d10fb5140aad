"""The part of a shim's plan that says how QEMU is started: its whole command line, so that the shim starts it at once.

A plan is JSON. `command` are the words of the command line, `descriptors` what QEMU inherits under the same numbers,
and `state` the number of one with a state to load, or -1. The shim makes the sockets to QEMU, whose other ends get the
numbers AGENT and QMP there.
"""

from __future__ import annotations

from typing import Any

from insula.machine.qemu.command_line import MachineConfig, arguments, descriptors
from insula.machine.shim.start import AGENT, QMP


def command(config: MachineConfig, program: str) -> dict[str, Any]:
    """That part of the plan. `config` has the numbers that descriptors have in the container, and no sockets."""
    words = arguments(config._replace(agent=AGENT, qmp=QMP), program)
    return {"command": words, "descriptors": descriptors(config), "state": config.state}
