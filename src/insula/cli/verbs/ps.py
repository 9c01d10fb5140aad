"""insula ps: list instances with their state."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import age, listing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

GONE = ("exited", "failed", "created", "removing")


def run(arguments: Arguments) -> int:
    views = connect(arguments).instances.list(None if arguments.all_tenants else arguments.tenant)
    if not arguments.all:
        views = [view for view in views if view["status"]["state"] not in GONE or view["restarting"]]
    if arguments.quiet and not arguments.json:
        for view in views:
            print(view["instance"]["name"])
        return 0
    header = ["NAME", "IMAGE", "STATE", "ADDRESS", "PORTS", "PID", "AGE"]
    if arguments.all_tenants:
        header.insert(0, "TENANT")
    return listing(arguments.json, views, header, (row(view, arguments.all_tenants) for view in views))


def row(view: dict[str, Any], with_tenant: bool) -> list[Any]:
    instance, status = view["instance"], view["status"]
    addresses = [port["address"] for port in instance["ports"] if port["wanted"] == "plugged"]
    cells = [
        instance["name"],
        instance["spec"]["image"],
        shown(view) + ("" if view["reconciled"] else " (?)"),
        ", ".join(addresses) or None,
        ", ".join(map(show_published, instance["spec"]["published"])) or None,
        status.get("pid"),
        age(instance["created"]),
    ]
    return [instance["tenant"], *cells] if with_tenant else cells


def show_published(port: dict[str, Any]) -> str:
    """``8080:80/tcp``, or with an address ``[::1]:8080:80/tcp``."""
    from insula.model import publishing  # not needed by most commands

    return publishing.show(*(port[name] for name in ("port", "target", "count", "protocol", "address")))


def shown(view: dict[str, Any]) -> str:
    """`state`, or ``running (unresponsive)``."""
    if view["status"]["state"] == "running" and not view["responsive"]:
        return "running (unresponsive)"
    return state(view["status"], restarting=view["restarting"], health=view["health"])


def state(status: dict[str, Any], *, restarting: bool = False, health: dict[str, Any] | None = None) -> str:
    """``running``, ``running (healthy)``, ``exited (1)``, ``exited (137, out of memory)``, ``restarting (1)``,
    ``failed: why``."""
    word: str = status["state"]
    if health and word == "running":
        return f"{word} ({health['status']})"
    ended = status["exit"]
    if word == "exited" and ended:
        word = "restarting" if restarting else word
        code = "?" if ended["exit_status"] is None else ended["exit_status"]
        return f"{word} ({code}, out of memory)" if ended["oom"] else f"{word} ({code})"
    return f"{word}: {status['error']}" if word == "failed" and status["error"] else word


COMMANDS = {
    "ps": Command(
        run,
        "List the tenant's running instances.",
        options=[
            Option("-a --all", "also those that don't run"),
            Option("-A --all-tenants", "those of every tenant"),
            Option("-q --quiet", "names alone"),
        ],
    )
}
