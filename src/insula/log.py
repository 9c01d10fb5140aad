"""Log lines of insulad, the monitor and the zygote on the standard error: time, level, source, message.

If the standard error is the journal (systemd.exec(5), JOURNAL_STREAM), a line has no time, which the journal records,
and begins with its priority, as ``<3>`` (sd-daemon(3)). `write` is for the small processes and imports little; `set_up`
is for insulad and configures the standard library's logging.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from collections.abc import Mapping

PRIORITIES = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}
"""syslog(3) priorities of Python's levels."""
TIME = "%Y-%m-%d %H:%M:%S"


def to_journal(environ: Mapping[str, str] = os.environ, fd: int = 2) -> bool:
    """Whether the descriptor `fd` is the stream to the journal (JOURNAL_STREAM)."""
    named = environ.get("JOURNAL_STREAM")
    if not named:
        return False
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return named == f"{found.st_dev}:{found.st_ino}"


def line(level: str, source: str, message: str, trace: str = "", *, journal: bool) -> str:
    """Format a log entry, with its newline. For the journal, each line of it begins with the priority."""
    text = f"{level} {source}: {message}\n{trace}"
    if not journal:
        return f"{time.strftime(TIME)} {text}"
    return "".join(f"<{PRIORITIES[level]}>{each}\n" for each in text.splitlines())


def write(source: str, message: str, error: BaseException | None = None, level: str = "ERROR") -> None:
    """Log without the logging module, with a traceback if `error` is neither None nor an OSError."""
    trace = ""
    if error:
        message = f"{message}: {error!r}"
        if not isinstance(error, OSError):
            import traceback

            trace = "".join(traceback.format_exception(error))
    try:
        text = line(level, source, message, trace, journal=to_journal())
        os.write(2, text.encode(errors="backslashreplace"))  # in one write: lines of several processes don't mix
    except OSError:  # a full disk must not end the process
        return


def set_up(level: str) -> None:
    """Configure the standard library's logging for insulad: `level` and above, to the standard error."""
    import logging

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            trace = self.formatException(record.exc_info) + "\n" if record.exc_info else ""
            name = record.levelname if record.levelname in PRIORITIES else "INFO"
            return line(name, record.name, record.getMessage(), trace, journal=journal).removesuffix("\n")

    journal = to_journal()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every write to a client that has disconnected
