"""insula events: what changes, as it changes."""

from __future__ import annotations

from insula.cli.options import Arguments, Command, Option
from insula.cli.output import clean
from insula.client import Client


def run(arguments: Arguments) -> int:
    import json

    for event in Client(arguments.socket).host.events(arguments.from_revision):
        if arguments.json:
            print(json.dumps(event), flush=True)
        else:
            print("  ".join(f"{name}={clean(value)}" for name, value in event.items() if value is not None), flush=True)
    return 0


COMMANDS = {
    "events": Command(
        run,
        "Show changes of tenants, networks, images and instances until interrupted; with --json one object a line.",
        options=[Option("--from-revision", "begin after this revision of the store", "N", parse=int)],
    )
}
