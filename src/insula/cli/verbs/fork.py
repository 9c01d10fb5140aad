"""insula fork"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, whole
from insula.cli.output import clean, print_json
from insula.model.rules import MAX_FORKS


def fork(arguments: Arguments) -> int:
    made = connect(arguments).snapshots.fork(arguments.tenant, arguments.name, arguments.number)
    if arguments.json:
        print_json(made)
    else:
        for view in made:
            print(clean(view["instance"]["name"]))
    return 0


COMMANDS = {
    "fork": Command(
        fork,
        "Make copies of a virtual machine that runs, with its memory: its programs go on in each of them.",
        "NAME",
        [Option("-n --number", "how many copies (1)", "NUMBER", default=1, parse=whole(1, MAX_FORKS))],
        details="They are called NAME-1, NAME-2 and so on. Each has a disk, addresses, a host name, an ID and random\n"
        "numbers of its own before a program in it goes on. Published ports stay those of NAME.\n"
        "Copies of a disk image have its disk as it is now, and are booted.",
        complete={"NAME": "instance"},
    )
}
