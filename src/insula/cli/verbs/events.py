"""insula events: show changes as they happen."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, whole
from insula.cli.output import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def run(arguments: Arguments) -> int:
    import json

    for event in connect(arguments).host.events(arguments.from_revision, audit=arguments.audit):
        if arguments.json:
            print(json.dumps(event), flush=True)
        else:
            print(line(event), flush=True)
    return 0


def line(event: dict[str, Any]) -> str:
    """``12:30:01  instance exited acme/web  exit_status=0``, local time."""
    import time

    known = ("time", "revision", "cursor", "kind", "action", "tenant", "name")
    moment = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    names = [event["tenant"]] if event["tenant"] and event["kind"] != "tenant" else []
    about = "/".join([*names, *([event["name"]] if event["name"] is not None else [])])
    words = [moment, f"{event['kind']} {event['action']} {about}".rstrip()]
    said = {name: value for name, value in event.items() if name not in known and value is not None}
    words += [f"{name}={value}" for name, value in said.items() if value is not False]
    return "  ".join(map(clean, words))


COMMANDS = {
    "events": Command(
        run,
        "Show changes of tenants, networks, images and instances until interrupted; with --json one object a line.",
        options=[
            Option("--from-revision", "start after this revision of the store", "N", parse=whole(0)),
            Option("--audit", "also users' requests, as in `insula audit`"),
        ],
    )
}
