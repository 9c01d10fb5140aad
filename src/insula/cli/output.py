"""Output of commands: tables, JSON, ages, without control sequences.

Names, commands and log lines come from tenants. A terminal executes control sequences in them (they can hide lines, or
make it send input as if keys were pressed), so listings have control characters escaped.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x2028, 0x2029}

_DEFAULT_HINT = "see insulad's log"


def clean(value: object) -> str:
    """Convert `value` to one line of printable text: C0, C1, bidi controls and surrogates are escaped."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() and ord(character) not in _BIDI
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, indent: str = "") -> None:
    """Format columns, padded to their widest cell; None is shown as "-"."""
    cells = [list(header), *([("-" if cell is None else clean(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print(indent + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(value: object) -> None:
    """Print indented JSON in ASCII, in which JSON escapes control characters."""
    import json

    print(json.dumps(value, indent=2))


def listing(as_json: bool, value: object, header: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
    """Print `value` as JSON, or `rows` as a table; returns the exit status 0."""
    if as_json:
        print_json(value)
    else:
        table(header, rows)
    return 0


def age(since: float | None, now: float | None = None) -> str:
    """Format an age as one number: ``5s``, ``3m``, ``2h``, ``4d``."""
    if since is None:
        return "-"
    if now is None:
        import time

        now = time.time()
    seconds = max(now - since, 0.0)
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "m"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit:.0f}{name}"
    return f"{seconds // 86400:.0f}d"


def moment(seconds: float) -> str:
    """Format a time as ``2026-12-24 18:00``, local time."""
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def size(value: int | None) -> str:
    """Format a size as ``64M``; "-" for None."""
    from insula.model.units import format_size

    return "-" if value is None else format_size(value)


def error(message: str, hint: str | None = None) -> None:
    """Print ``error: what; hint: what to do`` as one line on the standard error."""
    try:
        sys.stdout.flush()
    except OSError:  # the reader of the output has gone; the flush at exit must not fail again
        import os

        os.dup2(os.open("/dev/null", os.O_WRONLY), sys.stdout.fileno())
    print(f"error: {clean(message)}; hint: {clean(hint or _DEFAULT_HINT)}", file=sys.stderr)


def warn(message: str) -> None:
    """Print a line on the standard error."""
    print(clean(message), file=sys.stderr)
