"""The records of a container's log, as one iterator."""

from __future__ import annotations

import time
from collections.abc import Iterator

from insula.container.log import LogEntry, LogReader


def read_log(directory: str, *, follow: bool = False, since_ns: int = 0, tail: int | None = None) -> Iterator[LogEntry]:
    """The records of the log in order; with `follow` it waits for more and never ends by itself (blocking)."""
    with LogReader(directory, since_ns=since_ns, tail=tail) as reader:
        while True:
            records = reader.poll()
            yield from records
            if not records:
                if not follow:
                    return
                time.sleep(0.05)
