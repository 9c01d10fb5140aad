"""insula peer offer | accept | end | ls | show"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import age, clean, listing, print_json
from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_EVERYTHING = ("tcp", "udp", "icmp")
_HINT = "write as in tcp/5432, tcp/8000-8010, udp, icmp or any"


def ports(text: str) -> list[dict[str, Any]]:
    """Parse ports that are opened to a peer. Invalid."""
    if text == "any":
        return [{"protocol": protocol} for protocol in _EVERYTHING]
    protocol, slash, rest = text.partition("/")
    if protocol not in _EVERYTHING or (slash and protocol == "icmp"):
        raise Invalid(f"{text[:60]!r} is no protocol with ports", _HINT)
    if not slash:
        return [{"protocol": protocol}]
    first, dash, last = rest.partition("-")
    for number in (first, last if dash else first):
        if not (number.isascii() and number.isdigit() and 0 < int(number[:6]) < 1 << 16):
            raise Invalid(f"{text[:60]!r} is no protocol with ports", _HINT)
    match: dict[str, Any] = {"protocol": protocol, "port": int(first)}
    return [{**match, "end_port": int(last)} if dash else match]


def offer(arguments: Arguments) -> int:
    _need_network(arguments)
    allow = [each for some in arguments.allow for each in some] or None
    peerings = connect(arguments).peerings
    view = peerings.offer(arguments.tenant, arguments.peer, arguments.network, allow, arguments.name)
    return _said(arguments, view)


def accept(arguments: Arguments) -> int:
    if not arguments.endpoints:
        _need_network(arguments)
    elif arguments.network or arguments.allow:
        raise UsageError("--endpoints goes without --network and --allow", "give either")
    allow = [each for some in arguments.allow for each in some]
    peerings = connect(arguments).peerings
    view = peerings.accept(arguments.tenant, arguments.peer, arguments.network, allow, arguments.name)
    return _said(arguments, view)


def _need_network(arguments: Arguments) -> None:
    if not arguments.network:
        raise UsageError("a peering needs --network", "give a network of this tenant, as in --network default")


def _said(arguments: Arguments, view: dict[str, Any]) -> int:
    print_json(view) if arguments.json else print(f"{view['peer']}/{view['name']}")
    return 0


def end(arguments: Arguments) -> int:
    connect(arguments).peerings.end(arguments.tenant, arguments.peer, arguments.name)
    if not arguments.json:
        print(f"{arguments.peer}/{arguments.name}")
    return 0


def ls(arguments: Arguments) -> int:
    views = connect(arguments).peerings.list(arguments.tenant)
    header = ["PEER", "NAME", "STATE", "NETWORKS", "OPEN TO PEER", "NETWORKS OF PEER", "OPEN HERE", "AGE"]
    return listing(arguments.json, views, header, (row(view) for view in views))


def row(view: dict[str, Any]) -> list[Any]:
    beyond = ", ".join(f"{each['name']} {each['subnet']}" for each in view["peer_networks"])
    return [
        view["peer"],
        view["name"],
        _state(view),
        ", ".join(view["networks"]) or None,
        _shown(view["allow"]),
        beyond or None,
        _shown(view["peer_allow"]),
        age(view["created"]),
    ]


def _state(view: dict[str, Any]) -> str:
    if view["state"] == "active":
        return "active"
    return f"offered by {view['offered_by']}"


def _shown(allow: list[dict[str, Any]]) -> str | None:
    found = []
    for match in allow:
        first, last = match.get("port"), match.get("end_port")
        text = match["protocol"] if first is None else f"{match['protocol']}/{first}"
        found.append(f"{text}-{last}" if last else text)
    return ", ".join(found) or None


def show(arguments: Arguments) -> int:
    view = connect(arguments).peerings.get(arguments.tenant, arguments.peer, arguments.name)
    if arguments.json:
        print_json(view)
        return 0
    shown = {
        "peer": view["peer"],
        "name": view["name"],
        "state": _state(view),
        "networks": ", ".join(view["networks"]),
        "open": _shown(view["allow"]),
        "created": f"{age(view['created'])} ago",
    }
    for name, value in shown.items():
        print(f"{name:12} {clean(value or '') or '-'}")
    for each in view["peer_networks"]:
        subnets = " ".join(each[name] for name in ("subnet", "subnet6") if each.get(name))
        print(f"{'peer network':12} {clean(each['name'])} {clean(subnets)}")
    print(f"{'open there':12} {clean(_shown(view['peer_allow']) or '-')}")
    return 0


_NAME = Option("--name", "the peering's name, if there are several with this tenant", "NAME", default="peering")
_NETWORK = Option("-n --network", "a network of this tenant in the peering", "NETWORK", many=True, complete="network")
COMMANDS = {
    "offer": Command(
        offer,
        "Offer another tenant a peering with networks of this one. It has no effect until that tenant accepts.",
        "PEER",
        [
            _NETWORK,
            Option("--allow", "what the peer may connect to, as in tcp/5432 (any)", "PORTS", many=True, parse=ports),
            _NAME,
        ],
    ),
    "accept": Command(
        accept,
        "Accept a peering that another tenant has offered, with networks of this one.",
        "PEER",
        [
            _NETWORK,
            Option("--allow", "what the peer may connect to (nothing)", "PORTS", many=True, parse=ports),
            Option("--endpoints", "for service endpoints only: addresses may overlap"),
            _NAME,
        ],
    ),
    "end": Command(
        end,
        "End a peering with another tenant, refuse an offer, or take one back. Open connections are cut.",
        "PEER",
        [_NAME],
    ),
    "ls": Command(ls, "List the tenant's peerings, and offers by and to it."),
    "show": Command(show, "Show a peering with both sides.", "PEER", [_NAME]),
}
