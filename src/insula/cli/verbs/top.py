"""insula top: show the processes of an instance as a tree, with their PIDs inside and on the host."""

from __future__ import annotations

from collections.abc import Iterator

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command
from insula.cli.output import listing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Process = dict[str, Any]

HEADER = ["INSIDE", "HOST", "USER", "HOST USER", "STATE", "TIME", "COMMAND"]


def run(arguments: Arguments) -> int:
    processes = connect(arguments).instances.top(arguments.tenant, arguments.name)
    return listing(arguments.json, processes, HEADER, rows(processes))


def rows(processes: list[Process]) -> Iterator[list[Any]]:
    """Make a row for each process, children below their parent; PIDs of nested PID namespaces follow the instance's."""
    for process, depth in tree(processes):
        pids = process["pids"][1:] if "pid" in process else process["pids"]
        inside = "/".join(map(str, pids)) or str(process["inside"])
        user = "?" if process["user"] is None else process["user"]
        command = "  " * depth + process["command"]
        host = process.get("pid"), process.get("uid")
        yield [inside, host[0], user, host[1], process["state"], spent(process["cpu"]), command]


def spent(seconds: float) -> str:
    """Format processor time as ``0.25s``, ``1:05`` (minutes), ``2:01:05`` (hours)."""
    if seconds < 60:
        return f"{seconds:.2f}s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours}:{minutes % 60:02}:{int(seconds % 60):02}" if hours else f"{minutes}:{int(seconds % 60):02}"


def order(process: Process) -> int:
    """Return the number by which processes are sorted: that on the host if it is known."""
    return int(process["pid"] if "pid" in process else process["inside"])


def tree(processes: list[Process]) -> Iterator[tuple[Process, int]]:
    """Yield every process with its depth; those whose parent is not in the list are roots."""
    children: dict[int, list[Process]] = {}
    known = {process["inside"] for process in processes}
    for process in sorted(processes, key=order):
        parent = process["parent"] if process["parent"] != process["inside"] else 0
        children.setdefault(parent if parent in known else 0, []).append(process)
    stack = [(process, 0) for process in reversed(children.pop(0, []))]
    while stack:
        process, depth = stack.pop()
        yield process, depth
        stack += [(child, depth + 1) for child in reversed(children.pop(process["inside"], []))]


COMMANDS = {
    "top": Command(
        run,
        "Show the processes of the running instance NAME.",
        "NAME",
        details="INSIDE is the PID in the instance, HOST the PID on the host, if you may see it. A process in\n"
        "a nested PID namespace of the instance has a PID in each, outermost first. TIME is its processor time.",
        complete={"NAME": "instance"},
    )
}
