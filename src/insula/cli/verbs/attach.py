"""insula attach: connect our terminal to a running instance's PID 1."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.terminal import DETACH_KEYS, detach_keys, interact, require_terminal


def run(arguments: Arguments) -> int:
    client = connect(arguments)
    spec = client.instances.get(arguments.tenant, arguments.name)["instance"]["spec"]
    stdin = spec["stdin"] and not arguments.no_stdin
    if spec["tty"] and stdin:
        require_terminal()
    with client.instances.attach(arguments.tenant, arguments.name, stdin=stdin) as attachment:
        status = interact(attachment, stdin=stdin, tty=spec["tty"], keys=arguments.detach_keys)
    return 0 if status is None else status


COMMANDS = {
    "attach": Command(
        run,
        "Show the output of the running instance NAME and, if it was run with -i, type to it.",
        "NAME",
        [
            Option("--no-stdin", "only watch"),
            Option(
                "--detach-keys", "keys that detach and leave it running", "KEYS", default=DETACH_KEYS, parse=detach_keys
            ),
        ],
        complete={"NAME": "instance"},
        details="The exit status is the instance's, or 0 after the detach keys.",
    )
}
