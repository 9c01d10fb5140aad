"""Errors and warnings: each is a line on stderr, and a line of the file that --log names.

Engines read the cause of a failure from the file: containerd and Podman take `msg` of the last JSON object whose
`level` is "error".
"""

from __future__ import annotations

import sys

from insula.oci.options import CommandLineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments


def open_file(arguments: VerbArguments) -> None:
    """Raise CommandLineError if the file of --log can't be written: its reader would miss the causes of errors."""
    try:
        with open(arguments.log, "a", encoding="utf-8"):
            return
    except OSError as problem:
        path, arguments.log = arguments.log, None
        raise CommandLineError(
            f"--log: {path} can't be written: {problem.strerror}", "name a file in a directory"
        ) from None


def error(message: str, arguments: VerbArguments) -> None:
    """Report why the command failed."""
    _report("error", message, arguments)


def warning(message: str, arguments: VerbArguments) -> None:
    """Report a problem in spite of which the command goes on."""
    _report("warning", message, arguments)


def debug(message: str, arguments: VerbArguments) -> None:
    """Report a step that was done, with --debug: to the file of --log only, if there is one, as runc does."""
    if not getattr(arguments, "debug", False):
        return
    line = one_line(message)
    if arguments.log:
        _append("debug", line, arguments)
    else:
        print(_entry("debug", line, arguments), file=sys.stderr)


def _report(level: str, message: str, arguments: VerbArguments) -> None:
    line = one_line(message)
    print(f"{level}: {line}", file=sys.stderr)
    if getattr(arguments, "log", None):
        _append(level, line, arguments)


def _append(level: str, line: str, arguments: VerbArguments) -> None:
    try:
        with open(arguments.log, "a", encoding="utf-8") as file:
            file.write(f"{_entry(level, line, arguments)}\n")
    except OSError as problem:
        print(f"warning: {one_line(arguments.log)} can't be written: {problem.strerror}", file=sys.stderr)


def _entry(level: str, line: str, arguments: VerbArguments) -> str:
    import time

    from insula.model.cpython import dumps

    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if arguments.log_format == "json":
        return dumps({"level": level, "msg": line, "time": now})
    return f'time="{now}" level={level} msg={dumps(line)}'


def one_line(text: str) -> str:
    """`text` as one line of printable UTF-8, with everything else escaped: parts of it may be hostile input."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return line.encode("utf-8", "backslashreplace").decode()
