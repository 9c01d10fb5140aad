"""insula whoami: show the sender of requests, and its roles."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command
from insula.cli.output import clean, moment, print_json


def run(arguments: Arguments) -> int:
    sender = connect(arguments).identities.whoami()
    if arguments.json:
        print_json(sender)
        return 0
    roles = [f"{role} of the host" for role in sender["host"]]
    roles += [f"{role} of tenant {tenant}" for tenant, role in sender["tenants"].items()]
    print(f"{clean(sender['user'])}, by {clean(sender['proof'])}: {clean(', '.join(roles) or 'no roles')}")
    if sender.get("display"):
        print(f"known as {clean(sender['display'])}")
    if sender["labels"]:
        print(
            "only for instances with " + clean(" ".join(f"{name}={value}" for name, value in sender["labels"].items()))
        )
    if sender["expires"]:
        print(f"until {moment(sender['expires'])}")
    return 0


COMMANDS = {"whoami": Command(run, "Show who you are to Insula, how that is proven, and your roles.")}
