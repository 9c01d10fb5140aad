"""insula snapshot create | ls | restore | rm"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import age, clean, listing, print_json
from insula.cli.verbs.lifecycle import each
from insula.client import Client
from insula.model.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def create(arguments: Arguments) -> int:
    snapshots, name = connect(arguments).snapshots, arguments.name or ""
    made = snapshots.create(arguments.tenant, arguments.instance, name, memory=arguments.memory)
    print_json(made) if arguments.json else print(clean(made["name"]))
    return 0


def ls(arguments: Arguments) -> int:
    found = connect(arguments).snapshots.list(arguments.tenant, arguments.instance)
    return listing(arguments.json, found, ["NAME", "OF", "SIZE", "AGE", "STATE", "STOOD"], map(row, found))


def row(snapshot: dict[str, Any]) -> list[Any]:
    of = "disk and memory" if snapshot["memory"] else "disk"
    size, stood = format_size(snapshot["size"]), f"{snapshot['stopped']:.3f}s"
    return [snapshot["name"], of, size, age(snapshot["created"]), snapshot["state"], stood]


def restore(arguments: Arguments) -> int:
    view = connect(arguments).snapshots.restore(arguments.tenant, arguments.instance, arguments.name)
    print_json(view) if arguments.json else print(clean(view["instance"]["name"]))
    return 0


def remove(client: Client, arguments: Arguments, name: str) -> None:
    client.snapshots.remove(arguments.tenant, arguments.instance, name)


_INSTANCE = {"INSTANCE": "instance"}
COMMANDS = {
    "create": Command(
        create,
        "Make a snapshot of a virtual machine's disk, while it runs or not.",
        "INSTANCE [NAME]",
        [Option("--memory", "of its memory as well, at the same moment: its programs can go on from there")],
        details="It takes space of the tenant's quota of disk, and is removed with the instance. The machine stands\n"
        "still while its disk is copied and its memory is written; `insula snapshot ls` shows for how long.",
        complete=_INSTANCE,
    ),
    "ls": Command(ls, "List the snapshots of an instance.", "INSTANCE", complete=_INSTANCE),
    "restore": Command(
        restore,
        "Have an instance go back to a snapshot. What it has on its disk now is lost.",
        "INSTANCE NAME",
        details="One that runs is ended first, and started again. With a snapshot of its memory the programs of that\n"
        "moment go on. If they don't, `insula start --cold` boots it from the disk of that moment.",
        complete=_INSTANCE,
    ),
    "rm": Command(each(remove), "Remove snapshots.", "INSTANCE NAME...", complete=_INSTANCE),
}
