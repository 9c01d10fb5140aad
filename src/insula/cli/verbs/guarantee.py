"""insula guarantee set | show | ls | clear"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError, or_none, whole
from insula.cli.output import age, clean, listing, print_json, size
from insula.model.units import format_rate, parse_cpus, parse_rate, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FIELDS = {  # of the API, by the name of the option
    "out": "floor_out",
    "in": "floor_in",
    "ceil_out": "ceiling_out",
    "ceil_in": "ceiling_in",
    "pps_out": "packets_out",
    "pps_in": "packets_in",
    "cpu": "cpus",
    "memory": "memory",
}


def set_(arguments: Arguments) -> int:
    given = {field: getattr(arguments, name) for name, field in _FIELDS.items()}
    values = {field: None if value == "none" else value for field, value in given.items() if value is not None}
    if not values:
        raise UsageError("there is nothing to set", "give --out, --in, --cpu, --memory or another option")
    view = connect(arguments).guarantees.set(arguments.tenant, arguments.instance, **values)
    print_json(view) if arguments.json else print(_who(view))
    return 0


def show(arguments: Arguments) -> int:
    view = connect(arguments).guarantees.get(arguments.tenant, arguments.instance)
    if arguments.json:
        print_json(view)
        return 0
    shown = {
        "tenant": view["tenant"],
        "instance": view["instance"] or "(the tenant as a whole)",
        "sends at least": _rate(view["floor_out"]),
        "at most": _rate(view["ceiling_out"], view["packets_out"]),
        "receives at least": _rate(view["floor_in"]),
        "at most ": _rate(view["ceiling_in"], view["packets_in"]),
        "CPUs at least": view["cpus"],
        "memory at least": None if view["memory"] is None else size(view["memory"]),
        "created": f"{age(view['created'])} ago",
    }
    for name, value in shown.items():
        print(f"{name:18} {'-' if value is None else clean(value)}")
    return 0


def ls(arguments: Arguments) -> int:
    views = connect(arguments).guarantees.list(arguments.tenant)
    header = ["INSTANCE", "OUT", "IN", "CEIL-OUT", "CEIL-IN", "CPUS", "MEMORY", "AGE"]
    return listing(arguments.json, views, header, (row(view) for view in views))


def row(view: dict[str, Any]) -> list[Any]:
    rates = [_rate(view[f"floor_{direction}"]) for direction in ("out", "in")]
    rates += [_rate(view[f"ceiling_{direction}"], view[f"packets_{direction}"]) for direction in ("out", "in")]
    memory = None if view["memory"] is None else size(view["memory"])
    return [view["instance"] or "(tenant)", *rates, view["cpus"], memory, age(view["created"])]


def clear(arguments: Arguments) -> int:
    connect(arguments).guarantees.clear(arguments.tenant, arguments.instance)
    return 0


def _who(view: dict[str, Any]) -> str:
    return str(view["instance"] or view["tenant"])


def _rate(bits: int | None, packets: int | None = None) -> str | None:
    parts = [format_rate(bits)] if bits is not None else []
    parts += [f"{packets}pps"] if packets is not None else []
    return " ".join(parts) or None


def _option(name: str, text: str, value: str, parse: Any) -> Option:
    return Option(name, f"{text}, or none", value, parse=or_none(parse))


_INSTANCE = {"INSTANCE": "instance"}
COMMANDS = {
    "set": Command(
        set_,
        "Set floors and ceilings: of an instance, or of the tenant as a whole. Others stay as they are.",
        "[INSTANCE]",
        [
            _option("--out", "bandwidth that it can always send with", "RATE", parse_rate),
            _option("--in", "bandwidth that it can always receive with", "RATE", parse_rate),
            _option("--ceil-out", "bandwidth that it sends with at most", "RATE", parse_rate),
            _option("--ceil-in", "bandwidth that it receives with at most", "RATE", parse_rate),
            _option("--pps-out", "packets that the instance sends a second at most", "N", whole(1)),
            _option("--pps-in", "packets that the instance receives a second at most", "N", whole(1)),
            _option("--cpu", "CPUs that it always gets", "N", parse_cpus),
            _option("--memory", "memory that is not taken from it", "SIZE", parse_size),
        ],
        details="Floors of tenants are admitted against what the host has, those of instances against the floors of\n"
        "their tenant; a refusal tells what is left. What nobody needs is shared. Operators set those of tenants.",
        complete=_INSTANCE,
    ),
    "show": Command(
        show, "Show floors and ceilings of an instance, or of the tenant as a whole.", "[INSTANCE]", complete=_INSTANCE
    ),
    "ls": Command(ls, "List the guarantees of the tenant and of its instances."),
    "clear": Command(
        clear,
        "Remove all floors and ceilings of an instance, or of the tenant as a whole.",
        "[INSTANCE]",
        complete=_INSTANCE,
    ),
}
