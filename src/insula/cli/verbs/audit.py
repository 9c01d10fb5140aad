"""insula audit: show the audit log."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import clean
from insula.cli.verbs.logs import moment
from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_KNOWN = (
    *("time", "id", "user", "proof", "uid", "gid", "pid", "socket", "address", "port"),
    *("verb", "tenant", "name", "status", "ms"),
)


def run(arguments: Arguments) -> int:
    import json

    entries = connect(arguments).host.audit(since=arguments.since, uid=arguments.who, tenant=arguments.named_tenant)
    for entry in entries:
        print(json.dumps(entry) if arguments.json else line(entry), flush=True)
    return 0


def line(entry: dict[str, Any]) -> str:
    """``2026-11-28T12:30:01Z  root(0) pid 812  POST /v1/…/{name}/stop acme/web  200``, and what else was noted."""
    if "verb" not in entry:
        return "  ".join(clean(f"{name}={value}") for name, value in entry.items())
    about = "/".join(str(part) for part in (entry["tenant"], entry["name"]) if part is not None)
    words = [
        f"{entry['time'][:19]}Z",
        sender(entry),
        f"{entry['verb']} {about}".rstrip(),
        "broken off" if entry["status"] is None else str(entry["status"]),
        *(f"{name}={value}" for name, value in entry.items() if name not in _KNOWN),
    ]
    return "  ".join(map(clean, words))


def sender(entry: dict[str, Any]) -> str:
    """``root(0) pid 812`` for the operator; ``ann by token 3f… from 192.0.2.7``, or from such a process."""
    address = entry.get("address")
    source = address or (f"{user(entry['uid'])} pid {entry['pid']}" if entry.get("uid") is not None else "?")
    if entry.get("proof", "socket") == "socket":
        return source
    return f"{entry['user']} by {entry['proof']} from {source}"


def user(uid: int) -> str:
    """Format a user as ``root(0)``, or only the number if this host does not know it."""
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name}({uid})"
    except (KeyError, OverflowError):
        return str(uid)


def number(text: str) -> int:
    """Return the number of a user, given as number or name."""
    import pwd

    if text.isascii() and text.isdigit() and len(text) < 11:
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise Invalid(f"there is no user {text[:60]!r}", "name one of this host, or its number") from None


COMMANDS = {
    "audit": Command(
        run,
        "Show requests of the host's users: changes, and reads of instances' data; oldest first.",
        options=[
            Option("--since", "only entries younger than this, as in 10m, or 2026-01-31T12:00", "TIME", parse=moment),
            Option("--who", "only requests of this user of the host, by name or number", "USER", parse=number),
        ],
        details="With -T only requests about that tenant; with --json one object a line.",
    )
}
