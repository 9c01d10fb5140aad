"""insula router create | update | route | ls | show | rm"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import age, clean, listing, print_json
from insula.cli.verbs.lifecycle import each
from insula.cli.verbs.run import pair
from insula.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def create(arguments: Arguments) -> int:
    labels = dict(pair(text, "label", default="") for text in arguments.label)
    routes = [_route(*pair(text, "route")) for text in arguments.route]
    view = connect(arguments).routers.create(arguments.tenant, arguments.name, arguments.network, routes, labels)
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def update(arguments: Arguments) -> int:
    if not (arguments.join or arguments.leave):
        raise UsageError("there is nothing to change", "give --join NETWORK or --leave NETWORK")
    return _change(arguments, join=arguments.join, leave=arguments.leave)


def route(arguments: Arguments) -> int:
    action, destination, hop = arguments.action, arguments.destination, arguments.nexthop
    if action == "add":
        if hop is None:
            raise UsageError("router route add needs a next hop", "as in router route add r1 172.16.0.0/12 10.0.0.5")
        return _change(arguments, add_routes=[_route(destination, hop)])
    if action != "rm":
        raise UsageError(f"router route has no verb {action[:60]!r}", "add or rm")
    if hop is not None:
        raise UsageError("router route rm takes no next hop", "a destination has one route")
    return _change(arguments, remove_routes=[destination])


def _route(destination: str, hop: str) -> dict[str, str]:
    return {"destination": destination, "next_hop": hop}


def _change(arguments: Arguments, **changes: Any) -> int:
    view = connect(arguments).routers.update(arguments.tenant, arguments.name, **changes)
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def ls(arguments: Arguments) -> int:
    views = connect(arguments).routers.list(arguments.tenant)
    return listing(arguments.json, views, ["NAME", "NETWORKS", "ROUTES", "STATE", "AGE"], (row(view) for view in views))


def row(view: dict[str, Any]) -> list[Any]:
    router = view["router"]
    networks = ", ".join(router["networks"]) or None
    return [router["name"], networks, len(router["routes"]), state(view["status"]), age(router["created"])]


def state(status: dict[str, Any]) -> str:
    return "ready" if status["ready"] else f"not ready: {status['reason'] or 'not measured yet'}"


def show(arguments: Arguments) -> int:
    view = connect(arguments).routers.get(arguments.tenant, arguments.name)
    if arguments.json:
        print_json(view)
        return 0
    router = view["router"]
    shown = {
        "tenant": router["tenant"],
        "name": router["name"],
        "networks": ", ".join(router["networks"]),
        "labels": ", ".join(f"{name}={value}" for name, value in router["labels"].items()),
        "created": f"{age(router['created'])} ago",
        "state": state(view["status"]),
    }
    for name, value in shown.items():
        print(f"{name:10} {clean(value) or '-'}")
    for each_route in router["routes"]:
        print(f"{'route':10} {clean(each_route['destination'])} via {clean(each_route['next_hop'])}")
    return 0


def rm(client: Client, arguments: Arguments, name: str) -> None:
    client.routers.remove(arguments.tenant, name)


_NAME = {"NAME": "router"}
COMMANDS = {
    "create": Command(
        create,
        "Create a router. Instances on its networks reach each other; other networks stay apart.",
        "NAME",
        [
            Option("-n --network", "a network that it joins", "NETWORK", many=True, complete="network"),
            Option("--route", "addresses, and the instance that forwards to them", "CIDR=ADDRESS", many=True),
            Option("-l --label", "set a label", "NAME[=VALUE]", many=True),
        ],
    ),
    "update": Command(
        update,
        "Have a router join and leave networks. Open connections with a network that it leaves are cut.",
        "NAME",
        [
            Option("--join", "a network that it joins", "NETWORK", many=True, complete="network"),
            Option("--leave", "a network that it leaves", "NETWORK", many=True, complete="network"),
        ],
        complete=_NAME,
    ),
    "route": Command(
        route,
        "Add or remove a static route: packets to DESTINATION go to NEXTHOP, an instance in one of its networks.",
        "ACTION NAME DESTINATION [NEXTHOP]",
        details="ACTION is add or rm. A route that is added replaces one to the same destination. The longest\n"
        "destination decides. The instance has to forward packets, and its port to allow their addresses.",
        complete={"ACTION": ("add", "rm"), **_NAME},
    ),
    "ls": Command(ls, "List the tenant's routers."),
    "show": Command(show, "Show a router with its routes and its measured state.", "NAME", complete=_NAME),
    "rm": Command(each(rm), "Remove routers. Their networks are apart from then on.", "NAME...", complete=_NAME),
}
