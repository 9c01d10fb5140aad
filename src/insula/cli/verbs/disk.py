"""insula disk ls | add | rm"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import listing, print_json
from insula.cli.output import size as shown
from insula.model.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEADER = ["NAME", "SIZE", "MOUNTED AT"]


def ls(arguments: Arguments) -> int:
    view = connect(arguments).instances.get(arguments.tenant, arguments.instance)
    disks: list[dict[str, Any]] = view["instance"]["spec"]["options"].get("disks", [])
    rows = ([each["name"], shown(each["size"]), each.get("mount")] for each in disks)
    return listing(arguments.json, disks, HEADER, rows)


def add(arguments: Arguments) -> int:
    disks = connect(arguments).disks
    view = disks.add(arguments.tenant, arguments.instance, arguments.name, arguments.size, arguments.mount)
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def rm(arguments: Arguments) -> int:
    connect(arguments).disks.remove(arguments.tenant, arguments.instance, arguments.name)
    return 0


_INSTANCE = {"INSTANCE": "instance"}
COMMANDS = {
    "ls": Command(ls, "List the further disks of a virtual machine.", "INSTANCE", complete=_INSTANCE),
    "add": Command(
        add,
        "Give a virtual machine one more disk, while it runs or not. In the guest it is /dev/disk/by-id/virtio-NAME.",
        "INSTANCE NAME",
        [
            Option("--size", "its size, as in 10g (4g)", "SIZE", parse=parse_size, default=4 << 30),
            Option("--mount", "make a file system on it, and mount it there", "PATH"),
        ],
        complete=_INSTANCE,
    ),
    "rm": Command(
        rm,
        "Remove a disk, with what is on it. While a program of the guest uses it, that is refused.",
        "INSTANCE NAME",
        complete=_INSTANCE,
    ),
}
