"""Witnesses: heads of the chain that are kept where the log is not.

A witness file has one head a line, ``2026-01-31T12:00:00.000000Z 17:HASH``, and is only appended to. It is worth as
much as it is hard to change for those who can change the log: a file on another host, or an append-only one.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from insula.audit.chain import ChainHead, parse_head

EVERY = 60.0
"""Seconds between heads, while there are new lines."""
_OPEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK


def append(path: Path, head: ChainHead, time: str) -> None:
    """Append a head, durably. OSError."""
    fd = os.open(path, _OPEN, 0o640)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "it is not a regular file")
        os.write(fd, f"{time} {head}\n".encode())
        os.fdatasync(fd)
    finally:
        os.close(fd)


def heads(text: str) -> list[ChainHead]:
    """Return the heads in the text of a witness, or of `insula audit head`. ValueError for a line without one."""
    return [parse_head(line.split()[-1]) for line in text.splitlines() if line.strip()]
