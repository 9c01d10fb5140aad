"""insula stats: show the usage of instances, once or continuously."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import size, table
from insula.model.errors import Invalid
from insula.model.units import parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Stats = dict[str, Any]

HOME_AND_CLEAR = "\x1b[H\x1b[J"  # ECMA-48: CUP, ED
HEADER = ["NAME", "CPU", "MEMORY", "LIMIT", "PIDS", "NET IN", "NET OUT", "READ", "WRITTEN", "DISK", "PRESSURE"]


def run(arguments: Arguments) -> int:
    import json
    import sys

    if arguments.all_tenants and arguments.name:
        raise UsageError("names and --all-tenants exclude each other", "leave out one of them")
    tenant = None if arguments.all_tenants else arguments.tenant
    interval = None if arguments.no_stream else arguments.interval
    begun = False
    for sample in connect(arguments).instances.stats(tenant, arguments.name, interval=interval):
        if arguments.json:
            print(json.dumps(sample), flush=True)
            continue
        if interval is not None and sys.stdout.isatty():
            print(HOME_AND_CLEAR, end="")
        elif begun:
            print()
        begun = True
        header = ["TENANT", *HEADER] if arguments.all_tenants else HEADER
        table(header, (row(each, arguments.all_tenants) for each in sample["instances"]))
        sys.stdout.flush()
    return 0


def row(stats: Stats, with_tenant: bool) -> list[Any]:
    moved = (stats[name] for name in ("received", "sent", "read", "written"))
    cells = [
        stats["name"],
        None if stats["cpu"] is None else f"{stats['cpu']:.1%}",
        size(stats["memory"]),
        size(stats["memory_limit"]),
        of(stats["pids"], stats["pids_limit"]),
        *(size(value) for value in moved),
        of(*(None if value is None else size(value) for value in (stats.get("disk"), stats.get("disk_limit")))),
        pressure(stats["pressure"]),
    ]
    return [stats["tenant"], *cells] if with_tenant else cells


def of(used: object, limit: object) -> str | None:
    return None if used is None else str(used) if limit is None else f"{used}/{limit}"


def pressure(measured: dict[str, dict[str, float]]) -> str | None:
    """``cpu 12/0 memory 0/0 io 3/1``: percent of the last 10 s in which some, and all, processes waited for it."""
    words = (f"{what} {kinds.get('some', 0):.0f}/{kinds.get('full', 0):.0f}" for what, kinds in measured.items())
    return " ".join(words) or None


def seconds(text: str) -> float:
    found = parse_duration(text)
    if not 0.1 <= found <= 3600:
        raise Invalid(f"{text[:60]!r} is not an interval", "from 100ms to 1h")
    return found


COMMANDS = {
    "stats": Command(
        run,
        "Show the usage of instances, until interrupted: of those named, or of all running ones of the tenant.",
        "[NAME...]",
        [
            Option("-A --all-tenants", "those of every tenant"),
            Option("--no-stream", "once"),
            Option("--interval", "how often (1s)", "TIME", default=1.0, parse=seconds),
        ],
        details="CPU is the part of one processor: two in full use are 200 %. MEMORY leaves out page cache that is\n"
        "easily reclaimed; LIMIT is the instance's own, or else its tenant's. DISK is what it\n"
        "has written and its limit, where the kernel counts it. PRESSURE is the part of the last\n"
        "ten seconds in which some/all of its processes waited, in percent, where control groups are of version 2\n"
        "and the kernel has PSI. With --json one object a line.",
        complete={"NAME": "instance"},
    )
}
