"""insula dump: print what there is as a file for `insula apply`."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command
from insula.cli.output import print_json
from insula.cli.verbs.apply import HOST, scope


def run(arguments: Arguments) -> int:
    text = connect(arguments).declared.dump(scope(arguments))
    print_json({"text": text}) if arguments.json else print(text, end="")
    return 0


COMMANDS = {
    "dump": Command(
        run,
        "Print networks, instances and roles of the tenant as YAML, without defaults: `insula apply` takes it.",
        options=[HOST],
        details="Values of environment variables are left out for those who may not run processes in instances.",
    )
}
