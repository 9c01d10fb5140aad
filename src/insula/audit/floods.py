"""Failed attempts of one source beyond a number a minute: they are counted, and the counts become lines.

Whoever may send requests without a proof could fill the log otherwise, and push what happened before out of it. The
first attempts are lines of their own, so that single ones can be seen with all that is known of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

FIRST = 10
"""Failed attempts a minute of one source that are lines of their own."""
OF_PRINCIPAL = 120
"""The same of a source that has proved who it is."""
FIRST_OF_ALL = 200
"""The same of all sources together that have no proof."""
SOURCES = 64
"""Sources without a proof that are counted separately in one minute. Those with one are as many as principals."""
WINDOW = 60.0
"""Seconds of a count."""
OTHERS = "other sources"


class Floods:
    """The counts of the current window. Methods may be called in any thread; times are monotonic seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: float | None = None
        self._seen: Counter[str] = Counter()
        self._of_all = 0
        self._counted: dict[str, Counter[str]] = {}

    def admit(self, source: str, result: str, now: float, *, proved: bool = False) -> bool:
        """Whether a failed attempt is to be a line; else it is counted. `result` is what is counted separately."""
        with self._lock:
            if self._begun is None or (now >= self._begun + WINDOW and not self._counted):
                self._begin(now)
            if proved or source in self._seen or len(self._seen) < SOURCES * FIRST:
                self._seen[source] += 1
                most = OF_PRINCIPAL if proved else FIRST
                if self._seen[source] <= most and (proved or self._of_all < FIRST_OF_ALL):
                    self._of_all += not proved
                    return True
            name = source if proved or source in self._counted or len(self._counted) < SOURCES else OTHERS
            counter = self._counted.setdefault(name, Counter())
            counter[result if result in counter or len(counter) < SOURCES else "other"] += 1
            return False

    def due(self) -> float | None:
        """When the window ends; None if nothing is counted."""
        with self._lock:
            return None if self._begun is None or not self._counted else self._begun + WINDOW

    def take(self, now: float, *, end: bool = False) -> list[Mapping[str, Any]]:
        """Return what was counted, as members of entries, if the window has ended, or at the `end`."""
        with self._lock:
            if self._begun is None or (now < self._begun + WINDOW and not end):
                return []
            counted, self._counted = self._counted, {}
            self._begin(None)
        return [
            {"failed": sum(counter.values()), "source": source, "results": dict(sorted(counter.items()))}
            for source, counter in counted.items()
        ]

    def _begin(self, now: float | None) -> None:
        self._begun, self._of_all = now, 0
        self._seen.clear()
