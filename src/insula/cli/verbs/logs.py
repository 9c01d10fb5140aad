"""insula logs: show an instance's output, on standard output and standard error as it was written."""

from __future__ import annotations

import os

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, whole
from insula.cli.terminal import STDERR, STDOUT, write_all
from insula.model.errors import Invalid
from insula.model.stream import Kind
from insula.model.units import parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re


def run(arguments: Arguments) -> int:
    client = connect(arguments)
    entries = client.instances.logs(
        arguments.tenant, arguments.name, follow=arguments.follow, tail=arguments.tail, since=arguments.since
    )
    careful = {fd: Printable() for fd in (STDOUT, STDERR) if os.isatty(fd) and not arguments.raw}
    starts = {STDOUT: True, STDERR: True}  # is this stream at the start of a line?
    for when, kind, data in entries:
        fd = STDERR if kind == Kind.STDERR else STDOUT
        if arguments.json:
            import json

            text = data.decode("utf-8", "replace")
            print(json.dumps({"time": when, "stream": Kind(kind).name.lower(), "text": text}), flush=True)
            continue
        if fd in careful:
            data = careful[fd].feed(data)
        if arguments.timestamps:
            data, starts[fd] = stamp(data, when, starts[fd])
        write_all(fd, data)
    for fd, output in careful.items():
        write_all(fd, output.feed(b"", final=True))
    return 0


def count(text: str) -> int | None:
    """Parse a number of lines; None for ``all``."""
    return None if text == "all" else whole(0)(text)


def moment(text: str) -> float:
    """Parse an age such as ``10m``, or a date and time (RFC 3339; local without a zone), to seconds since the epoch."""
    import time
    from datetime import datetime

    try:
        return time.time() - parse_duration(text)
    except Invalid:
        try:
            return datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            raise Invalid(f"{text[:60]!r} is not a time", "write an age as in 10m, or a date and time") from None


class Printable:
    """A filter for output to a terminal: text and colours pass, other control sequences are shown as text.

    So are bytes that are not UTF-8, because a single one may be a control character (C1, ECMA-48). Output arrives in
    pieces that may be split anywhere: an incomplete character or colour is kept until the next piece, or until the
    end, `final`.
    """

    def __init__(self) -> None:
        from codecs import getincrementaldecoder

        self._decoder = getincrementaldecoder("utf-8")("surrogateescape")
        self._held = ""

    def feed(self, data: bytes, *, final: bool = False) -> bytes:
        import re

        text = self._held + self._decoder.decode(data, final)
        self._held = ""
        if not final and (begun := re.search(r"\x1b(\[[0-9;:]{0,100})?\Z", text)):
            text, self._held = text[: begun.start()], begun[0]
        return re.sub(_CONTROL, _show, text).encode()


_CONTROL = r"\x1b\[[0-9;:]*m|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\udc80-\udcff]"


def _show(match: re.Match[str]) -> str:
    found = match[0]
    if found.startswith("\x1b["):
        return found
    return "".join(f"\\x{byte:02x}" for byte in found.encode("utf-8", "surrogateescape"))


def stamp(data: bytes, moment: float, at_start: bool) -> tuple[bytes, bool]:
    """Add the time (UTC, RFC 3339) before each line that starts in `data`; also returns whether a line starts next."""
    import time

    whole = int(moment)
    prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{int((moment - whole) * 1e6):06d}Z "
    *whole_lines, rest = data.split(b"\n")
    lines = [line + b"\n" for line in whole_lines] + ([rest] if rest else [])
    stamped = [(prefix.encode() if position or at_start else b"") + line for position, line in enumerate(lines)]
    return b"".join(stamped), data.endswith(b"\n") if data else at_start


COMMANDS = {
    "logs": Command(
        run,
        "Show the output of the instance NAME.",
        "NAME",
        [
            Option("-f --follow", "follow its output until it exits"),
            Option("-n --tail", "only the last N lines, or all", "N", parse=count),
            Option("--since", "only output younger than this, as in 10m, or 2026-01-31T12:00", "TIME", parse=moment),
            Option("-t --timestamps", "begin each line with its time"),
            Option("--raw", "on a terminal too, pass control sequences through"),
        ],
        complete={"NAME": "instance"},
    )
}
