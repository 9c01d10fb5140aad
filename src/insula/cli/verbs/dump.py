"""insula dump: print what there is as a file for `insula apply`."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command
from insula.cli.output import print_json
from insula.cli.terminal import STDOUT, write_all
from insula.cli.verbs.apply import HOST, scope

_PRINTABLE = bytes(byte if 32 <= byte < 127 or byte == 10 else 63 for byte in range(256))
"""A dump is ASCII without control characters; if it has any, they are not sent to a terminal."""


def run(arguments: Arguments) -> int:
    pieces = connect(arguments).declared.dump(scope(arguments))
    if arguments.json:
        print_json({"text": b"".join(pieces).decode()})
        return 0
    for piece in pieces:
        write_all(STDOUT, piece.translate(_PRINTABLE))
    return 0


COMMANDS = {
    "dump": Command(
        run,
        "Print networks, instances and roles of the tenant as YAML, without defaults: `insula apply` takes it.",
        options=[HOST],
        details="Values of environment variables are left out for those who may not run processes in instances.",
    )
}
