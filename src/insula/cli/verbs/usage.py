"""insula usage: show what tenants have used and reserved over time."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import moment, print_json, size, table
from insula.cli.verbs.logs import moment as past
from insula.cli.verbs.top import spent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEADER = ["TENANT", "SINCE", "CPU", "OTHER", "RESERVED", "MEMORY", "RESERVED", "RECEIVED", "SENT", "IMAGES"]
INSTANCES = ["NAME", "CPU", "MEMORY", "NOT SAMPLED", "RECEIVED", "SENT"]


def run(arguments: Arguments) -> int:
    from os import environ

    tenants, named = connect(arguments).tenants, arguments.named_tenant or environ.get("INSULA_TENANT")
    if arguments.removed and arguments.named_tenant:
        raise UsageError("-T and --removed exclude each other", "leave out one of them")
    if arguments.removed or not named:
        usages = tenants.usage_of_all(arguments.since, removed=arguments.removed)
        if arguments.json:
            print_json(usages)
        else:
            table(HEADER, (row(each) for each in usages))
        return 0
    usage = tenants.usage(named, arguments.since)
    if arguments.json:
        print_json(usage)
        return 0
    table(HEADER, [row(usage)])
    if usage["instances"]:
        print()
        table(INSTANCES, ([each["name"], *of_instance(each["used"])] for each in usage["instances"]))
    return 0


def row(usage: dict[str, Any]) -> list[Any]:
    used, reserved = usage["used"], usage["reserved"]
    return [
        usage["tenant"],
        moment(usage["since"]),
        spent(used["cpu"] / 1e9),
        spent(usage["other_cpu"] / 1e9),
        spent(reserved["cpus"]),
        hours(used["memory"]),
        hours(reserved["memory"]),
        size(used["received"]),
        size(used["sent"]),
        size(usage["images"]["received"] + usage["images"]["sent"]),
    ]


def of_instance(used: dict[str, Any]) -> list[Any]:
    cells = [spent(used["cpu"] / 1e9), hours(used["memory"]), spent(used["memory_unsampled"])]
    return [*cells, size(used["received"]), size(used["sent"])]


def hours(byte_seconds: float) -> str:
    """``1.5Gh``: as much as 1.5 GiB for an hour."""
    return f"{size(round(byte_seconds / 3600))}h"


COMMANDS = {
    "usage": Command(
        run,
        "Show what tenants have used and reserved over time: all, or one with its instances (-T).",
        options=[
            Option("--since", "only from then on, as in 24h, or 2026-01-31T12:00", "TIME", parse=past),
            Option("--removed", "tenants that were removed, since then"),
        ],
        details="Without --since it is all since a tenant was created. History has full hours: SINCE may be up to an\n"
        "hour earlier. CPU is the processor time of instances, also of removed ones, OTHER that of the tenant's\n"
        "resolver, and of what no instance has used. The first RESERVED is in CPU-seconds. MEMORY is in\n"
        "byte-hours: 1.5Gh are 1.5 GiB for an hour; it is sampled every ten seconds, and the second RESERVED is\n"
        "exact. Instances are shown since they were created.",
    )
}
