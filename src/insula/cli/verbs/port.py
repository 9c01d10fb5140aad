"""insula port ls | plug | unplug"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import listing, print_json
from insula.cli.verbs.run import address_pair, attachment, with_own

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEADER = ["INSTANCE", "INTERFACE", "NETWORK", "ADDRESS", "ADDRESS6", "MAC", "ALLOWED"]


def ls(arguments: Arguments) -> int:
    instances = connect(arguments).instances
    if arguments.instance is None:
        views = instances.list(arguments.tenant)
    else:
        views = [instances.get(arguments.tenant, arguments.instance)]
    ports = [port for view in views for port in view["instance"]["ports"]]
    return listing(arguments.json, ports, HEADER, map(row, ports))


def row(port: dict[str, Any]) -> list[Any]:
    pairs = ", ".join(f"{pair['address']}@{pair['mac']}" if pair["mac"] else pair["address"] for pair in allowed(port))
    network = port["network"] if port["wanted"] == "plugged" else f"{port['network']} (being removed)"
    names = ("address", "address6", "mac")
    return [port["instance"], port["interface"], network, *(port[name] for name in names), pairs or None]


def allowed(port: dict[str, Any]) -> list[dict[str, Any]]:
    return list(port["allowed_pairs"])


def plug(arguments: Arguments) -> int:
    own = {"address": arguments.ip, "address6": arguments.ip6, "mac": arguments.mac}
    wanted = with_own(attachment(arguments.net), own)
    if arguments.allow:
        wanted["allowed_pairs"] = [*wanted.get("allowed_pairs", []), *map(address_pair, arguments.allow)]
    view = connect(arguments).ports.plug(arguments.tenant, arguments.instance, **wanted)
    if arguments.json:
        print_json(view)
    else:
        ports = view["instance"]["ports"]
        print(next(port["interface"] for port in ports if port["network"] == wanted["network"]))
    return 0


def unplug(arguments: Arguments) -> int:
    connect(arguments).ports.unplug(arguments.tenant, arguments.instance, arguments.port)
    return 0


_INSTANCE = {"INSTANCE": "instance"}
COMMANDS = {
    "ls": Command(ls, "List ports: connections of instances to networks.", "[INSTANCE]", complete=_INSTANCE),
    "plug": Command(
        plug,
        "Connect an instance to one more network, while it runs or not. The name of the interface is printed.",
        "INSTANCE NET",
        [
            Option("--ip", "its IPv4 address there; by default the next free one", "ADDRESS"),
            Option("--ip6", "its IPv6 address there", "ADDRESS"),
            Option("--mac", "its MAC address there; by default made of network and IPv4 address", "MAC"),
            Option("--allow", "it may use this address too, or range", "ADDRESS[@MAC]", many=True),
        ],
        complete={**_INSTANCE, "NET": "network"},
    ),
    "unplug": Command(
        unplug,
        "Disconnect an instance from a network, while it runs or not. Its other ports are not touched.",
        "INSTANCE PORT",
        complete={**_INSTANCE, "PORT": "network"},
        details="PORT is the name of the network, or of the interface, as in eth1.",
    ),
}
