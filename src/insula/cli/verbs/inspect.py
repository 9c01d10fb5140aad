"""insula inspect: show everything about an object as JSON."""

from __future__ import annotations

from contextlib import suppress

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, choice
from insula.cli.output import print_json
from insula.client import Client
from insula.model.errors import Conflict, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def _instance(client: Client, tenant: str, name: str) -> Any:
    """An instance; a machine of a disk image that runs with what its system says of itself."""
    found = client.instances.get(tenant, name)
    if found["instance"]["spec"]["options"].get("kind") == "machine" and found["status"]["state"] == "running":
        with suppress(Conflict, NotFound):  # it has just ended, or is of a container image
            found["guest_report"] = client.instances.guest(tenant, name)
    return found


KINDS: Mapping[str, Callable[[Client, str, str], Any]] = {
    "instance": _instance,
    "network": lambda client, tenant, name: client.networks.get(tenant, name),
    "router": lambda client, tenant, name: client.routers.get(tenant, name),
    "policy": lambda client, tenant, name: client.policies.get(tenant, name),
    "floating-ip": lambda client, tenant, name: client.floating_ips.get(tenant, name),
    "lb": lambda client, tenant, name: client.load_balancers.get(tenant, name),
    "image": lambda client, tenant, name: client.images.get(tenant, name),
    "tenant": lambda client, tenant, name: client.tenants.get(name),
}
"""The kinds of objects by the words of the command line, in the order in which a name is looked for."""


def run(arguments: Arguments) -> int:
    client, tenant = connect(arguments), arguments.tenant
    wanted = [arguments.type] if arguments.type else list(KINDS)
    found = []
    for name in arguments.name:
        for kind in wanted:
            try:
                found.append(KINDS[kind](client, tenant, name))
                break
            except NotFound:
                continue
        else:
            what = arguments.type or f"{', '.join(wanted[:-1])} or {wanted[-1]}"
            raise NotFound(f"tenant {tenant} has no {what} {name!r}", "see `insula ps -a`, or name the tenant with -T")
    print_json(found)
    return 0


COMMANDS = {
    "inspect": Command(
        run,
        "Show the wanted and measured state of instances (or other objects of a tenant) as JSON.",
        "NAME...",
        [
            Option(
                "--type",
                "look only among these",
                "|".join(KINDS),
                parse=choice(*KINDS),
                complete=tuple(KINDS),
            )
        ],
        complete={"NAME": "instance"},
    )
}
