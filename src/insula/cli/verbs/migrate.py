"""insula migrate"""

from __future__ import annotations

from insula.cli.connection import connect, connect_to
from insula.cli.options import Arguments, Command
from insula.cli.output import clean
from insula.client import remotes
from insula.model.errors import Invalid


def migrate(arguments: Arguments) -> int:
    if arguments.to == remotes.LOCAL:
        raise Invalid("an instance moves to another host", "`insula remote ls` lists those that you know")
    addresses = remotes.load(arguments.to)["addresses"]
    ticket = connect_to(arguments.to).migrations.ticket(arguments.tenant)
    target = {"addresses": addresses, "authority": ticket["authority"], "secret": ticket["secret"]}
    connect(arguments).migrations.migrate(arguments.tenant, arguments.name, target)
    print(f"{clean(arguments.name)} runs at {clean(arguments.to)}")
    return 0


COMMANDS = {
    "migrate": Command(
        migrate,
        "Move a virtual machine to another host while it runs, with its disk, memory and addresses.",
        "NAME TO",
        details="TO is a remote (`insula remote ls`) that has the same tenant, image and networks. It stands still\n"
        "for a part of a second. If it can't move, it goes on here.",
        complete={"NAME": "instance"},
    )
}
