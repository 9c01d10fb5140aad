"""What the daemon counts about itself, for /metrics: numbers of fixed size, however many objects there are."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

BOUNDS: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
"""The upper bounds of the buckets of a histogram, in seconds; one more bucket has the rest."""


class Histogram:
    """How long something took: the number of times in each bucket, and the sum of all in seconds."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> Sequence[tuple[str, int]]:
        """Return (upper bound, number of times up to it), as the exposition format of Prometheus has them."""
        found, below = [], 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            below += count
            found.append((bound, below))
        return found


class ControllerWork:
    """What a controller has done: passes over one object, those that failed, and the seconds that they took."""

    def __init__(self) -> None:
        self.passes = 0
        self.failures = 0
        self.seconds = 0.0

    @contextmanager
    def one(self, *expected: type[Exception]) -> Iterator[None]:
        """Count a pass. If an exception leaves the block that is not `expected`, it has failed."""
        begun = time.monotonic()
        self.passes += 1
        try:
            yield
        except expected:
            raise
        except Exception:
            self.failures += 1
            raise
        finally:
            self.seconds += time.monotonic() - begun


class Telemetry:
    """The counts of one daemon. `launches` are those that succeeded."""

    def __init__(self) -> None:
        self.instances = ControllerWork()
        self.networks = ControllerWork()
        self.launches = Histogram()
        self.failed_launches = 0
