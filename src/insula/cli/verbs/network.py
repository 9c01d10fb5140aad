"""insula network create | update | ls | show | rm | graph"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError, choice, whole
from insula.cli.output import age, clean, listing, print_json
from insula.cli.verbs.lifecycle import each
from insula.cli.verbs.run import pair
from insula.client import Client
from insula.model.errors import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def create(arguments: Arguments) -> int:
    if arguments.subnet is None:
        raise UsageError("network create needs --subnet", "as in --subnet 10.0.0.0/24")
    other: dict[str, Any] = {"labels": dict(pair(text, "label", default="") for text in arguments.label)}
    if arguments.mtu is not None:
        other["mtu"] = arguments.mtu
    if arguments.outbound is not None:
        other["outbound"] = arguments.outbound
    view = connect(arguments).networks.create(
        arguments.tenant, arguments.name, arguments.subnet, arguments.subnet6, **other
    )
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def update(arguments: Arguments) -> int:
    if arguments.outbound is None:
        raise UsageError("there is nothing to change", "give --outbound nat or --outbound none")
    view = connect(arguments).networks.update(arguments.tenant, arguments.name, outbound=arguments.outbound)
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def ls(arguments: Arguments) -> int:
    views = connect(arguments).networks.list(arguments.tenant)
    header = ["NAME", "SUBNET", "GATEWAY", "SUBNET6", "VNI", "PORTS", "STATE", "AGE"]
    return listing(arguments.json, views, header, (row(view) for view in views))


def row(view: dict[str, Any]) -> list[Any]:
    network, status = view["network"], view["status"]
    names = ("name", "subnet", "gateway", "subnet6", "vni")
    return [*(network.get(name) for name in names), status["ports"], state(status), age(network["created"])]


def state(status: dict[str, Any]) -> str:
    return "ready" if status["ready"] else f"not ready: {status['reason'] or 'not measured yet'}"


def show(arguments: Arguments) -> int:
    view = connect(arguments).networks.get(arguments.tenant, arguments.name)
    if arguments.json:
        print_json(view)
        return 0
    network, status = view["network"], view["status"]
    names = ("tenant", "name", "subnet", "gateway", "subnet6", "gateway6", "mtu", "outbound", "vni")
    shown = {name: network[name] for name in names if name in network}
    shown["labels"] = ", ".join(f"{name}={value}" for name, value in network["labels"].items())
    shown |= {"created": f"{age(network['created'])} ago", "state": state(status), "ports": status["ports"]}
    for name, value in shown.items():
        print(f"{name:10} {'-' if value in (None, '') else clean(value)}")
    return 0


def rm(client: Client, arguments: Arguments, name: str) -> None:
    client.networks.remove(arguments.tenant, name)


def graph(arguments: Arguments) -> int:
    import shutil
    import sys

    from insula.cli.graph import svg, text, topology

    found = topology.collect(connect(arguments), arguments.tenant)
    if arguments.svg is not None:
        _write(arguments.svg, svg.draw(found))
    if arguments.json:
        print_json(found)
    elif arguments.svg is None:
        unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        width = arguments.width or shutil.get_terminal_size((100, 24)).columns
        print("\n".join(text.draw(found, width, unicode=unicode)))
    return 0


def _write(path: str, content: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
    except OSError as error:
        raise Failed(f"{path} can't be written: {error.strerror}", "choose another file") from None


_NAME = {"NAME": "network"}
_WAYS = ("nat", "none")
_OUTBOUND = Option(
    "--outbound",
    "the way out (nat): nat by the host's address, none for no way out",
    "nat|none",
    parse=choice(*_WAYS),
    complete=_WAYS,
)
COMMANDS = {
    "create": Command(
        create,
        "Create a private network of the tenant. Other tenants may use the same addresses.",
        "NAME",
        [
            Option("--subnet", "its IPv4 addresses, as in 10.0.0.0/24; the first is the gateway's", "CIDR"),
            Option("--subnet6", "its IPv6 addresses, as in fd00:1::/64", "CIDR"),
            Option("--mtu", "the largest packet (1500)", "BYTES", parse=whole(1)),
            _OUTBOUND,
            Option("-l --label", "set a label", "NAME[=VALUE]", many=True),
        ],
    ),
    "update": Command(
        update,
        "Change a network. Open connections to the outside are cut with --outbound none.",
        "NAME",
        [_OUTBOUND],
        complete=_NAME,
    ),
    "ls": Command(ls, "List the tenant's networks."),
    "show": Command(show, "Show a network and its measured state.", "NAME", complete=_NAME),
    "rm": Command(each(rm), "Remove networks that no instance is on and no router joins.", "NAME...", complete=_NAME),
    "graph": Command(
        graph,
        "Draw the tenant's networks, what is on them, and what joins them.",
        options=[
            Option("--svg", "write an SVG file instead", "FILE", complete="file"),
            Option("--width", "columns of the drawing (those of the terminal)", "NUMBER", parse=whole(20)),
        ],
    ),
}
