"""insula tenant create | update | ls | show | rm"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError, or_none, whole
from insula.cli.output import age, clean, listing, print_json, size
from insula.cli.verbs.lifecycle import each
from insula.cli.verbs.run import pair
from insula.client import Client
from insula.model.units import parse_cpus, parse_rate, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def create(arguments: Arguments) -> int:
    labels = dict(pair(text, "label", default="") for text in arguments.label)
    view = connect(arguments).tenants.create(arguments.name, labels, **given(arguments, *LIMITS))
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def update(arguments: Arguments) -> int:
    view = connect(arguments).tenants.update(arguments.name, **changes(arguments, *LIMITS))
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def changes(arguments: Arguments, *names: str) -> dict[str, Any]:
    """Return the limits of the command line; None for those given as ``none``. UsageError without any."""
    found = given(arguments, *names)
    if not found:
        raise UsageError("there is nothing to change", f"give one of {', '.join(f'--{name}' for name in names)}")
    return found


def given(arguments: Arguments, *names: str) -> dict[str, Any]:
    """Return the limits of the command line, which may have none."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: None if value == "none" else value for name, value in values.items() if value is not None}


def ls(arguments: Arguments) -> int:
    views = connect(arguments).tenants.list()
    header = ["NAME", "INSTANCES", "CPUS", "MEMORY", "BANDWIDTH", "IDS", "AGE"]
    return listing(arguments.json, views, header, (row(view) for view in views))


def row(view: dict[str, Any]) -> list[Any]:
    tenant, limits = view["tenant"], view["tenant"]["limits"]
    return [
        tenant["name"],
        of(view.get("usage", {}).get("instances", 0), limits["instances"]),
        None if limits["cpus"] is None else f"{limits['cpus']:g}",
        size(limits["memory"]),
        rate(limits["bandwidth"]),
        f"{tenant['id_base']}-{tenant['id_base'] + 65535}" if "id_base" in tenant else None,
        age(tenant["created"]),
    ]


def of(used: Any, limit: Any) -> str:
    return str(used) if limit is None else f"{used}/{limit}"


def rate(bits: int | None) -> str | None:
    """``10Mbit``; None for no limit."""
    if bits is None:
        return None
    for unit, name in ((10**9, "Gbit"), (10**6, "Mbit"), (10**3, "kbit")):
        if bits >= unit:
            return f"{bits / unit:g}{name}"
    return f"{bits}bit"


def show(arguments: Arguments) -> int:
    client = connect(arguments)
    view = client.tenants.get(arguments.name)
    if arguments.json:
        print_json(view)
        return 0
    tenant = view["tenant"]
    print(f"tenant     {clean(tenant['name'])}")
    print(f"created    {age(tenant['created'])} ago")
    if "id_base" in tenant:
        print(f"user IDs   {tenant['id_base']} to {tenant['id_base'] + 65535} on this host")
    for name, value in tenant["limits"].items():
        print(f"{name:10} {limit(name, value)}{reserved(name, view['usage'].get(name))}")
    parts = {
        "labels": [f"{label}={value}" for label, value in tenant["labels"].items()],
        "networks": [each["network"]["name"] for each in client.networks.list(arguments.name)],
        "instances": [each["instance"]["name"] for each in client.instances.list(arguments.name)],
    }
    for what, names in parts.items():
        print(f"{what:10} {clean(', '.join(names) or '-')}")
    return 0


def limit(name: str, value: Any) -> str:
    return "no limit" if value is None else f"at most {amount(name, value)}"


def reserved(name: str, value: Any) -> str:
    """Return the sums of the instances' own limits, which may not exceed the tenant's."""
    return "" if not value else f", {amount(name, value)} {'there' if name == 'instances' else 'reserved by instances'}"


def amount(name: str, value: Any) -> str:
    return size(value) if name == "memory" else rate(value) or "-" if name == "bandwidth" else f"{value:.10g}"


def rm(client: Client, arguments: Arguments, name: str) -> None:
    client.tenants.remove(name, force=arguments.force)


LIMITS = ("cpus", "memory", "pids", "instances", "bandwidth")
_NAME = {"NAME": "tenant"}
COMMANDS = {
    "create": Command(
        create,
        "Create a tenant. Its limits apply to all of its instances together.",
        "NAME",
        [
            Option("--cpus", "at most so many CPUs", "N", parse=parse_cpus),
            Option("--memory", "at most so much memory, as in 4g", "SIZE", parse=parse_size),
            Option("--pids", "at most so many processes (16384), or none", "N", parse=or_none(whole(1))),
            Option("--instances", "at most so many instances", "N", parse=whole(1)),
            Option("--bandwidth", "at most so many bits a second, as in 100m", "RATE", parse=parse_rate),
            Option("-l --label", "set a label", "NAME[=VALUE]", many=True),
        ],
    ),
    "update": Command(
        update,
        "Change limits of a tenant. They apply at once; limits that are not given stay unchanged.",
        "NAME",
        [
            Option("--cpus", "at most so many CPUs, or none for no limit", "N", parse=or_none(parse_cpus)),
            Option("--memory", "at most so much memory, as in 4g, or none", "SIZE", parse=or_none(parse_size)),
            Option("--pids", "at most so many processes, or none", "N", parse=or_none(whole(1))),
            Option("--instances", "at most so many instances, or none", "N", parse=or_none(whole(1))),
            Option(
                "--bandwidth", "at most so many bits a second, as in 100m, or none", "RATE", parse=or_none(parse_rate)
            ),
        ],
        details="Refused below what its instances have reserved (`insula tenant show`), or use now.",
        complete=_NAME,
    ),
    "ls": Command(ls, "List the tenants."),
    "show": Command(show, "Show a tenant with its limits and reserved resources.", "NAME", complete=_NAME),
    "rm": Command(
        each(rm),
        "Remove tenants that have no instances, networks and images of their own.",
        "NAME...",
        [Option("-f --force", "kill and remove everything that they have first")],
        complete=_NAME,
    ),
}
