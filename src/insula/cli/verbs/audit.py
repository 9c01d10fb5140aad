"""insula audit: show the audit log, verify it, and what that takes: heads and keys."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import clean, error, print_json
from insula.cli.verbs.logs import moment
from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

_KNOWN = (
    *("time", "id", "user", "proof", "uid", "gid", "pid", "socket", "address", "port"),
    *("verb", "tenant", "name", "status", "ms", "principal", "seq", "prev", "mac"),
)
STATE = "/var/lib/insula/audit.key"
"""The file that says, to root, up to which line the log of this host reaches."""


def run(arguments: Arguments) -> int:
    import json

    if arguments.verify:
        return verify(arguments)
    if arguments.what == "head":
        return head(arguments)
    if arguments.what == "key":
        return key(arguments)
    if arguments.what:
        raise UsageError(f"there is no insula audit {arguments.what[:60]!r}", "head or key, or nothing")
    entries = connect(arguments).host.audit(since=arguments.since, uid=arguments.who, tenant=arguments.named_tenant)
    for entry in entries:
        print(json.dumps(entry) if arguments.json else line(entry), flush=True)
    return 0


def head(arguments: Arguments) -> int:
    found = connect(arguments).host.audit_head()
    if arguments.json:
        print_json(found)
    else:
        print(clean(found["head"]))
    return 0


def key(arguments: Arguments) -> int:
    print(clean(connect(arguments).host.new_audit_key()["key"]))
    return 0


def verify(arguments: Arguments) -> int:
    """Verify the log of insulad, or with --log files; exit status 1 if something is wrong with it."""
    import json

    from insula.audit import verification
    from insula.audit.chain import parse_head
    from insula.audit.keys import parse_keys
    from insula.audit.witness import heads as heads_of

    heads = [_checked(parse_head, text, "--since-head") for text in arguments.since_head]
    keys = [each for path in arguments.key for each in _checked(parse_keys, _text(path), path)]
    for path in arguments.witness:
        heads += _checked(heads_of, _text(path), path)
    if arguments.log:
        heads += _state(arguments.state)
        lines = verification.lines_of_files(_path(arguments.log))
    else:
        host = connect(arguments).host
        found = host.audit_head()
        heads += [parse_head(text) for text in {found["head"], found["stored"]} - {None, "0:"}]
        lines = verification.lines_of_pieces(host.audit_raw())
    heads = sorted(set(heads))
    result = verification.verify(lines, heads, keys)
    if arguments.json:
        print(json.dumps(result._asdict()))
    else:
        print("\n".join(map(clean, verification.describe(result, heads, keys))))
    if result.wrong:
        error(f"{result.wrong} things are wrong with the audit log", "see the lines above")
    return 1 if result.wrong else 0


def _state(path: str | None) -> list[Any]:
    """Return the head that insulad has kept beside its state; none if there is no such file, and none was named."""
    from insula.audit.keys import KeyFile

    try:
        chain = KeyFile(_path(path or STATE)).load()
    except FileNotFoundError:
        if path is None:
            return []
        raise
    if chain is None:
        raise Invalid(f"{path or STATE} is damaged", "name a head that was kept elsewhere by --since-head")
    return [chain.head]


def _path(text: str) -> Any:
    from pathlib import Path

    return Path(text)


def _text(path: str) -> str:
    import sys

    return sys.stdin.read() if path == "-" else str(_path(path).read_text())


def _checked(parse: Callable[[str], T], text: str, where: str) -> T:
    try:
        return parse(text)
    except ValueError as problem:
        raise Invalid(f"{where}: {problem}", "see insula-audit(1)") from None


def line(entry: dict[str, Any]) -> str:
    """``2026-11-28T12:30:01Z  root(0) pid 812  POST /v1/…/{name}/stop acme/web  200``, and what else was noted."""
    if "verb" not in entry or "failed" in entry:
        return "  ".join(clean(f"{name}={value}") for name, value in entry.items())
    about = "/".join(str(entry[part]) for part in ("tenant", "name") if entry.get(part) is not None)
    words = [
        f"{entry['time'][:19]}Z",
        sender(entry),
        f"{entry['verb']} {about}".rstrip(),
        result(entry),
        *(f"{name}={value}" for name, value in entry.items() if name not in _KNOWN),
    ]
    return "  ".join(map(clean, words))


def result(entry: dict[str, Any]) -> str:
    if entry.get("phase") == "begun":
        return "begun"
    ended = "broken off" if entry.get("status") is None else str(entry["status"])
    return f"ended {ended}" if entry.get("phase") == "ended" else ended


def sender(entry: dict[str, Any]) -> str:
    """``root(0) pid 812`` for the operator; ``ann by token 3f… from 192.0.2.7``, or from such a process."""
    address = entry.get("address")
    source = address or (f"{user(entry['uid'])} pid {entry['pid']}" if entry.get("uid") is not None else "?")
    if entry.get("proof", "socket") == "socket":
        return source
    return f"{entry['user']} by {entry.get('proof')} from {source}"


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
        "Show requests: changes, reads of instances' data, and what failed; oldest first.",
        "[WHAT]",
        complete={"WHAT": ("head", "key")},
        options=[
            Option("--verify", "find changed, missing, repeated and moved lines instead of showing them"),
            Option("--since-head", "verify with this head: it must be among the lines", "HEAD", many=True),
            Option("--witness", "verify with the heads in this file", "PATH", many=True, complete="file"),
            Option(
                "--key",
                "verify with the keys in this file; - is the standard input",
                "PATH",
                many=True,
                complete="file",
            ),
            Option("--log", "verify this file and its rotated ones, without insulad", "PATH", complete="file"),
            Option("--state", f"the file of the key, with --log ({STATE})", "PATH", complete="file"),
            Option("--since", "only entries younger than this, as in 10m, or 2026-01-31T12:00", "TIME", parse=moment),
            Option("--who", "only requests of this user of the host, by name or number", "USER", parse=number),
        ],
        details="With -T only requests about that tenant; with --json one object a line.\n"
        "`insula audit head` prints number and hash of the last line: keep it elsewhere. `insula audit key` begins\n"
        "with a new key, and prints the one that verifies all lines from then on: it is shown once, not kept here.\n"
        "--verify reads the lines from insulad, and checks them on this machine.",
    )
}
