"""insula group create | update | ls | show | rm"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import age, clean, listing, print_json
from insula.cli.verbs.lifecycle import each
from insula.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def create(arguments: Arguments) -> int:
    group = connect(arguments).address_groups.create(arguments.tenant, arguments.name, arguments.cidr)
    print_json(group) if arguments.json else print(arguments.name)
    return 0


def update(arguments: Arguments) -> int:
    if not (arguments.add or arguments.remove):
        raise UsageError("there is nothing to change", "give --add CIDR or --remove CIDR")
    groups = connect(arguments).address_groups
    group = groups.update(arguments.tenant, arguments.name, add=arguments.add, remove=arguments.remove)
    print_json(group) if arguments.json else print(arguments.name)
    return 0


def ls(arguments: Arguments) -> int:
    groups = connect(arguments).address_groups.list(arguments.tenant)
    return listing(arguments.json, groups, ["NAME", "RANGES", "AGE"], (_row(group) for group in groups))


def _row(group: dict[str, Any]) -> list[Any]:
    cidrs = group["cidrs"]
    more = f" and {len(cidrs) - 3} more" if len(cidrs) > 3 else ""
    return [group["name"], ", ".join(cidrs[:3]) + more, age(group["created"])]


def show(arguments: Arguments) -> int:
    group = connect(arguments).address_groups.get(arguments.tenant, arguments.name)
    if arguments.json:
        print_json(group)
        return 0
    for cidr in group["cidrs"]:
        print(clean(cidr))
    return 0


def rm(client: Client, arguments: Arguments, name: str) -> None:
    client.address_groups.remove(arguments.tenant, name)


_NAME = {"NAME": "group"}
COMMANDS = {
    "create": Command(create, "Create an address group, for the rules of policies.", "NAME CIDR..."),
    "update": Command(
        update,
        "Add ranges, and remove some. The policies that use the group change at once.",
        "NAME",
        [
            Option("--add", "a range more, as in 10.0.0.0/8", "CIDR", many=True),
            Option("--remove", "a range less", "CIDR", many=True),
        ],
        complete=_NAME,
    ),
    "ls": Command(ls, "List the tenant's address groups."),
    "show": Command(show, "Show the ranges of an address group.", "NAME", complete=_NAME),
    "rm": Command(each(rm), "Remove address groups that no policy uses.", "NAME...", complete=_NAME),
}
