"""Options of `insula run` for virtual machines."""

from __future__ import annotations

from insula.cli.options import Arguments, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_OF_CONTAINERS = (
    *("init", "shm_size", "ulimit", "cap_add", "cap_drop", "sysctl", "pid", "nesting", "socket_family", "aio"),
    *("pids", "inodes"),
)
"""Options that a virtual machine can't have: it has a kernel of its own, and counts its own processes and files."""


def machine_options(arguments: Arguments) -> dict[str, Any]:
    """Return the `MachineOptions` of the options."""
    if given := [name for name in _OF_CONTAINERS if getattr(arguments, name)]:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} is of containers, and --vm asks for a virtual machine", "leave out one of them")
    return {"kind": "machine", "cold": arguments.cold, "group_add": arguments.group_add}
