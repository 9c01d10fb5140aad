"""insula lb create | update | ls | show | rm"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError, choice, whole
from insula.cli.output import age, clean, listing, print_json
from insula.cli.policy_rules import selector, selector_text
from insula.cli.verbs.lifecycle import each
from insula.cli.verbs.run import pair
from insula.client import Client
from insula.model.units import parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ON = "write FLOATING-IP, network:NAME, network:NAME,ip=ADDRESS,ip6=ADDRESS, host: or host:ADDRESS"


def create(arguments: Arguments) -> int:
    if not arguments.listen or not arguments.on:
        raise UsageError("lb create needs --listen and --on", "as in --listen tcp/80 --on network:default")
    spec = _changes(arguments)
    listen, labels = spec.pop("listen"), dict(pair(text, "label", default="") for text in arguments.label)
    on = [place(text) for text in arguments.on]
    if health := _health(arguments, {}):
        spec["health"] = health
    view = connect(arguments).load_balancers.create(arguments.tenant, arguments.name, listen, on, labels=labels, **spec)
    print_json(view) if arguments.json else print(clean(" ".join([arguments.name, *map(_address, view["addresses"])])))
    return 0


def update(arguments: Arguments) -> int:
    client, changes = connect(arguments), _changes(arguments)
    if _health(arguments, {}):
        now = client.load_balancers.get(arguments.tenant, arguments.name)["health"]
        changes["health"] = _health(arguments, now)
    if not changes:
        raise UsageError("there is nothing to change", "give --backend, --listen, --port, --affinity or --health")
    view = client.load_balancers.update(arguments.tenant, arguments.name, **changes)
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def _changes(arguments: Arguments) -> dict[str, Any]:
    """The fields of a spec that options give."""
    found: dict[str, Any] = {}
    if arguments.listen:
        found["listen"] = [port(text) for text in arguments.listen]
    if arguments.backend:
        words = [word for text in arguments.backend for word in text.split(",")]
        conditions = [word for word in words if "=" in word]
        found["select"] = selector(conditions) if conditions else None
        found["instances"] = [word for word in words if "=" not in word]
    for name in ("port", "affinity"):
        if getattr(arguments, name) is not None:
            found[name] = getattr(arguments, name)
    return found


def _health(arguments: Arguments, now: dict[str, Any]) -> dict[str, Any] | None:
    """The check that options give, with the other fields as they are now; None if none is given."""
    given = {
        "kind": arguments.health,
        "path": arguments.health_path,
        "port": arguments.health_port,
        "interval": arguments.interval,
        "timeout": arguments.timeout,
        "threshold": arguments.threshold,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return {**now, **given} if given else None


def port(text: str) -> dict[str, Any]:
    """Parse what a balancer listens on: ``tcp/80``."""
    protocol, slash, number = text.partition("/")
    if not slash or protocol not in ("tcp", "udp") or not (number.isascii() and number.isdigit() and len(number) < 6):
        raise UsageError(f"{text[:60]!r} is no port to listen on", "as in tcp/80 or udp/53")
    return {"protocol": protocol, "port": int(number)}


def place(text: str) -> dict[str, Any]:
    """Parse an address of a balancer."""
    head, *options = text.split(",")
    kind, colon, name = head.partition(":")
    if not colon and not options and kind:
        return {"floating_ip": kind}
    if kind == "host" and not options:
        return {"address": name.strip("[]") or None}
    if kind != "network" or not name:
        raise UsageError(f"{text[:60]!r} is no address of a load balancer", _ON)
    found: dict[str, Any] = {"network": name}
    for option in options:
        key, equals, value = option.partition("=")
        field = {"ip": "address", "ip6": "address6"}.get(key)
        if not equals or field is None:
            raise UsageError(f"{option[:60]!r} is no option of an address", _ON)
        found[field] = value
    return found


def ls(arguments: Arguments) -> int:
    views = connect(arguments).load_balancers.list(arguments.tenant)
    header = ["NAME", "ADDRESSES", "PORTS", "BACKENDS", "HEALTHY", "AGE"]
    return listing(arguments.json, views, header, (row(view) for view in views))


def row(view: dict[str, Any]) -> list[Any]:
    balancer, backends = view, view["backends"]
    healthy = sum(each["state"] == "healthy" for each in backends)
    addresses = ", ".join(map(_address, view["addresses"])) or None
    return [balancer["name"], addresses, _ports(balancer), len(backends), healthy, age(balancer["created"])]


def _ports(balancer: dict[str, Any]) -> str:
    return ", ".join(f"{each['protocol']}/{each['port']}" for each in balancer["listen"])


def _address(address: str | None) -> str:
    return "host" if address is None else address


def show(arguments: Arguments) -> int:
    view = connect(arguments).load_balancers.get(arguments.tenant, arguments.name)
    if arguments.json:
        print_json(view)
        return 0
    balancer, health = view, view["health"]
    select = balancer["select"]
    shown = {
        "tenant": balancer["tenant"],
        "name": balancer["name"],
        "addresses": ", ".join(map(_address, view["addresses"])),
        "listens": _ports(balancer),
        "backends": ", ".join([*([selector_text(select)] if select else []), *balancer["instances"]]),
        "port": balancer["port"],
        "affinity": balancer["affinity"],
        "health": health_text(health),
        "labels": ", ".join(f"{name}={value}" for name, value in balancer["labels"].items()),
        "created": f"{age(balancer['created'])} ago",
    }
    for name, value in shown.items():
        print(f"{name:10} {clean(value) or '-'}")
    if versions := refused(view):
        print(f"{'refuses':10} connections over {' and '.join(versions)}: no backend of it is healthy")
    for backend in view["backends"]:
        where = f"{backend['instance']} {backend['address'] or '-'} port {backend['port']}"
        print(f"{'backend':10} {clean(where)}: {backend['state']}, {clean(backend['reason'])}")
    return 0


def refused(view: dict[str, Any]) -> list[str]:
    """The IP versions of a balancer's addresses that no healthy backend has; the host's addresses are of those that
    backends have."""
    backends = [each for each in view["backends"] if each["address"]]
    served = {version(each["address"]) for each in backends if each["state"] == "healthy"}
    known = {version(each["address"]) for each in backends} or {"IPv4", "IPv6"}
    listened = {each for address in view["addresses"] for each in ([version(address)] if address else known)}
    return sorted(listened - served)


def version(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"


def health_text(check: dict[str, Any]) -> str:
    """A check for people: ``http /health every 5 s, 2 of 3``."""
    if check["kind"] == "none":
        return "none"
    what = f"http {check['path']}" if check["kind"] == "http" else "tcp"
    where = f" port {check['port']}" if check["port"] else ""
    votes = f"{check['threshold']} of {2 * check['threshold'] - 1}"
    return f"{what}{where} every {check['interval']:g} s, timeout {check['timeout']:g} s, {votes}"


def rm(client: Client, arguments: Arguments, name: str) -> None:
    client.load_balancers.remove(arguments.tenant, name)


_NAME = {"NAME": "load-balancer"}
_OPTIONS = [
    Option("--listen", "a port of the balancer, as in tcp/80", "PROTOCOL/PORT", many=True),
    Option("--backend", "instances with these labels, or of this name", "LABEL=VALUE|NAME", many=True),
    Option("--port", "the backends' port, by default that of the first --listen", "PORT", parse=whole(1)),
    Option("--affinity", "source: all connections of a client's address go to one backend", "AFFINITY",
           parse=choice("none", "source"), complete=("none", "source")),
    Option("--health", "tcp: connect; http: GET is answered with 200 to 399; none", "KIND",
           parse=choice("tcp", "http", "none"), complete=("tcp", "http", "none")),
    Option("--health-path", "what is asked for by http, by default /", "PATH"),
    Option("--health-port", "another port than that of the backends", "PORT", parse=whole(1)),
    Option("--interval", "time between two checks, by default 5s", "DURATION", parse=parse_duration),
    Option("--timeout", "time until a check fails, by default 2s", "DURATION", parse=parse_duration),
    Option("--threshold", "N of the last 2N-1 checks decide, by default 2 of 3", "N", parse=whole(1)),
]  # fmt: skip
COMMANDS = {
    "create": Command(
        create,
        "Create a load balancer. Connections to its addresses are spread over the instances that pass a check.",
        "NAME",
        [
            Option("--on", "an address of the balancer: see below", "ADDRESS", many=True),
            *_OPTIONS,
            Option("-l --label", "set a label", "NAME[=VALUE]", many=True),
        ],
        details="ADDRESS is the name of a floating address that is attached to nothing; network:NAME for free ones\n"
        "of a network, network:NAME,ip=A,ip6=A for these; host: for every address of the host, host:A for one.\n"
        "Backends see their clients' addresses.",
    ),
    "update": Command(
        update,
        "Change a load balancer. What is given replaces what was there; open connections stay with their backends.",
        "NAME",
        _OPTIONS,
        complete=_NAME,
    ),
    "ls": Command(ls, "List the tenant's load balancers."),
    "show": Command(show, "Show a load balancer, and which backends get connections, and why.", "NAME", complete=_NAME),
    "rm": Command(each(rm), "Remove load balancers. Connections through them are cut.", "NAME...", complete=_NAME),
}
