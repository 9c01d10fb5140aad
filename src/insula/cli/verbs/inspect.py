"""insula inspect: show everything about an object as JSON."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, choice
from insula.cli.output import print_json
from insula.model.errors import NotFound


def run(arguments: Arguments) -> int:
    client, tenant = connect(arguments), arguments.tenant
    kinds = {
        "instance": lambda name: client.instances.get(tenant, name),
        "network": lambda name: client.networks.get(tenant, name),
        "router": lambda name: client.routers.get(tenant, name),
        "image": lambda name: client.images.get(tenant, name),
        "tenant": lambda name: client.tenants.get(name),
    }
    wanted = [arguments.type] if arguments.type else list(kinds)
    found = []
    for name in arguments.name:
        for kind in wanted:
            try:
                found.append(kinds[kind](name))
                break
            except NotFound:
                continue
        else:
            what = arguments.type or "instance, network, router, image or tenant"
            raise NotFound(f"tenant {tenant} has no {what} {name!r}", "see `insula ps -a`, or name the tenant with -T")
    print_json(found)
    return 0


KINDS = ("instance", "network", "router", "image", "tenant")

COMMANDS = {
    "inspect": Command(
        run,
        "Show the wanted and measured state of instances (or networks, routers, images, tenants) as JSON.",
        "NAME...",
        [
            Option(
                "--type",
                "look only among these",
                "instance|network|router|image|tenant",
                parse=choice(*KINDS),
                complete=KINDS,
            )
        ],
        complete={"NAME": "instance"},
    )
}
