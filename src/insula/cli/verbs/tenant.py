"""insula tenant create | update | ls | show | rm"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError, or_none, whole
from insula.cli.output import age, clean, listing, print_json, size
from insula.cli.verbs.lifecycle import each
from insula.cli.verbs.run import pair
from insula.client import Client
from insula.model.quotas import QUOTAS, TABLE, Quota
from insula.model.units import parse_cpus, parse_rate, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def create(arguments: Arguments) -> int:
    labels = dict(pair(text, "label", default="") for text in arguments.label)
    view = connect(arguments).tenants.create(arguments.name, labels, **given(arguments, *LIMITS))
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def update(arguments: Arguments) -> int:
    relabels = arguments.label or arguments.unlabel
    patch = given(arguments, *LIMITS) if relabels else changes(arguments, *LIMITS)
    if relabels:
        patch["labels"] = new_labels(arguments.label, arguments.unlabel)
    view = connect(arguments).tenants.update(arguments.name, **patch)
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def changes(arguments: Arguments, *names: str) -> dict[str, Any]:
    """Return the limits of the command line; None for those given as ``none``. UsageError without any."""
    found = given(arguments, *names)
    if not found:
        raise UsageError(
            "there is nothing to change", f"give one of {', '.join(f'--{name}'.replace('_', '-') for name in names)}"
        )
    return found


def given(arguments: Arguments, *names: str) -> dict[str, Any]:
    """Return the limits of the command line, which may have none."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: None if value == "none" else value for name, value in values.items() if value is not None}


def new_labels(given: list[str], removed: list[str]) -> dict[str, str | None]:
    """Return changes of labels, of which None removes one, from ``NAME[=VALUE]`` and names. UsageError."""
    labels: dict[str, str | None] = dict(pair(text, "label", default="") for text in given)
    return labels | dict.fromkeys(removed)


def ls(arguments: Arguments) -> int:
    views = connect(arguments).tenants.list()
    header = ["NAME", "INSTANCES", "CPUS", "MEMORY", "NETWORKS", "IMAGES", "BANDWIDTH", "IDS", "AGE"]
    return listing(arguments.json, views, header, (row(view) for view in views))


def row(view: dict[str, Any]) -> list[Any]:
    tenant, limits, usage = view["tenant"], view["tenant"]["limits"], view["usage"]
    counted = ("instances", "cpus", "memory", "networks", "images")
    return [
        tenant["name"],
        *(of(QUOTAS[name], usage.get(name, 0), limits.get(name)) for name in counted),
        rate(limits["bandwidth"]),
        f"{tenant['id_base']}-{tenant['id_base'] + 65535}" if "id_base" in tenant else None,
        age(tenant["created"]),
    ]


def of(quota: Quota, used: Any, limit: Any) -> str:
    """``3/20``: what is used, and the limit if there is one."""
    return quota.show(used) if limit is None else f"{quota.show(used)}/{quota.show(limit)}"


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
    print(f"{'tenant':17}{clean(tenant['name'])}")
    print(f"{'created':17}{age(tenant['created'])} ago")
    if "id_base" in tenant:
        print(f"{'user IDs':17}{tenant['id_base']} to {tenant['id_base'] + 65535} on this host")
    for quota in TABLE:
        if quota.name in tenant["limits"]:
            print(f"{quota.name.replace('_', ' '):17}{state(quota, tenant['limits'], view['usage'])}")
    if (disk := view.get("disk")) and disk["used"] is not None:
        print(f"{'on disk':17}{size(disk['used'])}, {disk['inodes']} files and directories")
    parts = {
        "labels": [f"{label}={value}" for label, value in tenant["labels"].items()],
        "networks": [each["network"]["name"] for each in client.networks.list(arguments.name)],
        "routers": [each["router"]["name"] for each in client.routers.list(arguments.name)],
        "load balancers": [each["name"] for each in client.load_balancers.list(arguments.name)],
        "floating addresses": [each["floating_ip"]["name"] for each in client.floating_ips.list(arguments.name)],
        "instances": [each["instance"]["name"] for each in client.instances.list(arguments.name)],
    }
    for what, names in parts.items():
        print(f"{what:17}{clean(', '.join(names) or '-')}")
    return 0


def state(quota: Quota, limits: dict[str, Any], usage: dict[str, Any]) -> str:
    """``at most 20, 3 in use, 17 left``."""
    limit, used = limits[quota.name], usage.get(quota.name)
    show = rate if quota.unit == "bit/s" else quota.show
    parts = ["no limit" if limit is None else f"at most {show(limit)}"]
    if used is not None:
        parts.append(f"{quota.show(used)} in use")
        if limit is not None:
            parts.append(f"{quota.show(max(0, round(limit - used, 6)))} left")
    return ", ".join(parts)


def rm(client: Client, arguments: Arguments, name: str) -> None:
    client.tenants.remove(name, force=arguments.force)


LIMITS = tuple(quota.name for quota in TABLE)


def parser(quota: Quota) -> Callable[[str], object]:
    """Return the parser of a limit."""
    parsers = {"cpus": parse_cpus, "bytes": parse_size, "bit/s": parse_rate}
    return parsers.get(quota.unit) or whole(int(quota.least))


def options() -> list[Option]:
    """Return an option for each quota."""
    words = {"bytes": "SIZE", "bit/s": "RATE"}
    return [
        Option(
            quota.option,
            f"at most so {'much' if quota.unit == 'bytes' else 'many'} {quota.text}, or none",
            words.get(quota.unit, "N"),
            parse=or_none(parser(quota)),
        )
        for quota in TABLE
    ]


_NAME = {"NAME": "tenant"}
COMMANDS = {
    "create": Command(
        create,
        "Create a tenant. Its limits are for all that it has together; insulad.toml(5) has those that are not given.",
        "NAME",
        [
            *options(),
            Option("-l --label", "set a label", "NAME[=VALUE]", many=True),
        ],
    ),
    "update": Command(
        update,
        "Change limits and labels of a tenant, at once. What is not given stays unchanged.",
        "NAME",
        [
            *options(),
            Option("-l --label", "set a label; the operator's policies select by it", "NAME[=VALUE]", many=True),
            Option("--unlabel", "remove a label", "NAME", many=True),
        ],
        details="Refused below what it has in use (`insula tenant show`).",
        complete=_NAME,
    ),
    "ls": Command(ls, "List the tenants."),
    "show": Command(
        show, "Show a tenant with its limits, and what is in use and left of them.", "NAME", complete=_NAME
    ),
    "rm": Command(
        each(rm),
        "Remove tenants that have no instances, networks, routers and images of their own.",
        "NAME...",
        [Option("-f --force", "kill and remove everything that they have first")],
        complete=_NAME,
    ),
}
