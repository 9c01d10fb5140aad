"""Reading entries of the log and its rotated files, oldest first. The records of the chain itself are left out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from insula.audit.files import LONGEST_LINE, open_all

_PIECE = 1 << 17


def timestamp(seconds: float) -> str:
    """Format a time as in RFC 3339, in UTC with microseconds, so that times sort as text."""
    return f"{datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def read(
    path: Path, files: int, *, since: float | None = None, uid: int | None = None, tenant: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the entries, without lines that are not JSON."""
    begin = timestamp(since) if since is not None else ""
    with contextlib.ExitStack() as stack:
        for file in reversed(open_all(path, files, stack)):
            while raw := file.readline(LONGEST_LINE):
                try:
                    entry = json.loads(raw)
                except ValueError:
                    continue
                if (
                    isinstance(entry, dict)
                    and "chain" not in entry
                    and str(entry.get("time", "")) >= begin
                    and uid in (None, entry.get("uid"))
                    and tenant in (None, entry.get("tenant"))
                ):
                    yield entry


def read_raw(path: Path, files: int) -> Iterator[bytes]:
    """Yield the bytes of all files, oldest first, in pieces. A file is as it was when this began, or longer."""
    with contextlib.ExitStack() as stack:
        for file in reversed(open_all(path, files, stack)):
            while piece := file.read(_PIECE):
                yield piece
