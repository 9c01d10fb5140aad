"""insula endpoint create | ls | show | rm"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import age, clean, listing, print_json
from insula.cli.verbs.lifecycle import each
from insula.client import Client
from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HINT = "write PEER/INSTANCE:PORT, as in acme/db:tcp/5432"


def target(text: str) -> dict[str, Any]:
    """Parse what an endpoint leads to. Invalid."""
    peer, slash, rest = text.partition("/")
    instance, colon, service = rest.partition(":")
    protocol, _, port = service.rpartition("/")
    if not (peer and slash and instance and colon and port.isascii() and port.isdigit() and len(port) <= 5):
        raise Invalid(f"{text[:100]!r} is no port of a peer's instance", _HINT)
    return {"peer": peer, "instance": instance, "protocol": protocol or "tcp", "port": int(port)}


def create(arguments: Arguments) -> int:
    if arguments.to is None or arguments.network is None:
        raise UsageError("endpoint create needs --network and --to", _HINT)
    more = {"address": arguments.ip, "address6": arguments.ip6, "peering": arguments.peering}
    given = {name: value for name, value in more.items() if value is not None}
    endpoints = connect(arguments).endpoints
    made = endpoints.create(arguments.tenant, arguments.name, arguments.network, **arguments.to, **given)
    print_json(made) if arguments.json else print(clean(made["address"]))
    return 0


def ls(arguments: Arguments) -> int:
    found = connect(arguments).endpoints.list(arguments.tenant)
    header = ["NAME", "NETWORK", "ADDRESS", "ADDRESS6", "LEADS TO", "AGE"]
    return listing(arguments.json, found, header, (row(endpoint) for endpoint in found))


def row(endpoint: dict[str, Any]) -> list[Any]:
    names = ("name", "network", "address", "address6")
    return [*(endpoint.get(name) for name in names), leads_to(endpoint), age(endpoint["created"])]


def leads_to(endpoint: dict[str, Any]) -> str:
    return f"{endpoint['peer']}/{endpoint['instance']}:{endpoint['protocol']}/{endpoint['port']}"


def show(arguments: Arguments) -> int:
    endpoint = connect(arguments).endpoints.get(arguments.tenant, arguments.name)
    if arguments.json:
        print_json(endpoint)
        return 0
    names = ("tenant", "name", "network", "address", "address6", "peering")
    shown = {name: endpoint.get(name) for name in names}
    shown |= {"leads to": leads_to(endpoint), "created": f"{age(endpoint['created'])} ago"}
    for name, value in shown.items():
        print(f"{name:10} {clean(value or '') or '-'}")
    return 0


def rm(client: Client, arguments: Arguments, name: str) -> None:
    client.endpoints.remove(arguments.tenant, name)


COMMANDS = {
    "create": Command(
        create,
        "Create an address in a network of the tenant that is one port of a peer's instance.",
        "NAME",
        [
            Option("-n --network", "the network of this tenant that has the address", "NETWORK", complete="network"),
            Option("--to", "what it leads to, as in acme/db:tcp/5432", "PEER/INSTANCE:PORT", parse=target),
            Option("--peering", "the peering, if there are several with this peer (peering)", "NAME"),
            Option("--ip", "its IPv4 address (a free one)", "ADDRESS"),
            Option("--ip6", "its IPv6 address (a free one)", "ADDRESS"),
        ],
        details="It works also where both tenants have the same addresses: see insula peer accept --endpoints.",
    ),
    "ls": Command(ls, "List the tenant's service endpoints."),
    "show": Command(show, "Show a service endpoint.", "NAME"),
    "rm": Command(each(rm), "Remove service endpoints. Open connections are cut.", "NAME..."),
}
