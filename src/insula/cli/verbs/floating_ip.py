"""insula floating-ip allocate | attach | detach | ls | show | release"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, choice
from insula.cli.output import age, clean, listing, print_json
from insula.cli.verbs.lifecycle import each
from insula.cli.verbs.run import pair
from insula.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def allocate(arguments: Arguments) -> int:
    spec: dict[str, Any] = {"labels": dict(pair(text, "label", default="") for text in arguments.label)}
    given = {"address": arguments.address, "family": arguments.family}
    spec |= {name: value for name, value in given.items() if value is not None}
    if arguments.attach is not None:
        spec["instance"], spec["network"] = place(arguments.attach)
    view = connect(arguments).floating_ips.allocate(arguments.tenant, arguments.name or "", **spec)
    found = view["floating_ip"]
    print_json(view) if arguments.json else print(clean(f"{found['name']} {found['address']}"))
    return 0


def attach(arguments: Arguments) -> int:
    instance, network = place(arguments.instance)
    return _change(arguments, instance, network)


def detach(arguments: Arguments) -> int:
    return _change(arguments, None, None)


def place(text: str) -> tuple[str, str | None]:
    """Split INSTANCE[:NETWORK]."""
    instance, _, network = text.partition(":")
    return instance, network or None


def _change(arguments: Arguments, instance: str | None, network: str | None) -> int:
    view = connect(arguments).floating_ips.update(arguments.tenant, arguments.name, instance, network)
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def ls(arguments: Arguments) -> int:
    views = connect(arguments).floating_ips.list(arguments.tenant)
    header = ["NAME", "ADDRESS", "INSTANCE", "TARGET", "AGE"]
    return listing(arguments.json, views, header, (row(view) for view in views))


def row(view: dict[str, Any]) -> list[Any]:
    found = view["floating_ip"]
    target = view["target"] or (f"none: {view['reason']}" if view["reason"] else None)
    return [found["name"], found["address"], view["instance"], target, age(found["created"])]


def show(arguments: Arguments) -> int:
    view = connect(arguments).floating_ips.get(arguments.tenant, arguments.name)
    if arguments.json:
        print_json(view)
        return 0
    found = view["floating_ip"]
    shown = {
        "tenant": found["tenant"],
        "name": found["name"],
        "address": found["address"],
        "instance": view["instance"],
        "network": found["network"],
        "target": view["target"] or view["reason"],
        "labels": ", ".join(f"{name}={value}" for name, value in found["labels"].items()),
        "created": f"{age(found['created'])} ago",
    }
    for name, value in shown.items():
        print(f"{name:10} {clean(value) or '-'}")
    return 0


def release(client: Client, arguments: Arguments, name: str) -> None:
    client.floating_ips.release(arguments.tenant, name)


_NAME = {"NAME": "floating-ip"}
COMMANDS = {
    "allocate": Command(
        allocate,
        "Allocate a floating address of the operator's pool. It leads from outside to an instance.",
        "[NAME]",
        [
            Option("--address", "this address of the pool, by default a free one", "ADDRESS"),
            Option(
                "--family",
                "ipv4, which is the default, or ipv6",
                "FAMILY",
                parse=choice("ipv4", "ipv6"),
                complete=("ipv4", "ipv6"),
            ),
            Option("--attach", "attach it to an instance, by its port on a network", "INSTANCE[:NETWORK]"),
            Option("-l --label", "set a label", "NAME[=VALUE]", many=True),
        ],
        details="An address that is attached to nothing may have published ports (`run -p ADDRESS:80:80`).",
    ),
    "attach": Command(
        attach,
        "Have a floating address lead to an instance, with all ports and protocols, also if it led to another.",
        "NAME INSTANCE",
        details="By default it leads to the instance's first network, INSTANCE:NETWORK names another. What it\n"
        "sends to the outside from there has this address. Open connections with the instance before are cut.",
        complete={**_NAME, "INSTANCE": "instance"},
    ),
    "detach": Command(
        detach, "Have a floating address lead nowhere. Open connections by it are cut.", "NAME", complete=_NAME
    ),
    "ls": Command(ls, "List the tenant's floating addresses."),
    "show": Command(show, "Show a floating address.", "NAME", complete=_NAME),
    "release": Command(
        each(release), "Release floating addresses. Any tenant may get them then.", "NAME...", complete=_NAME
    ),
}
