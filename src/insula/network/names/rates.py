"""Limits of rates: a token bucket for each client."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimit:
    """Allows `rate` events a second for each client, and `burst` at once. Clients that are idle take no memory."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when they were counted
        self._pruned = clock()

    def allows(self, client: str, cost: float = 1.0) -> bool:
        """Take `cost` tokens of the client; False if it has too few."""
        now = self._clock()
        self._prune(now)
        tokens, since = self._buckets.get(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        if tokens < cost:
            self._buckets[client] = tokens, now
            return False
        self._buckets[client] = tokens - cost, now
        return True

    def _prune(self, now: float) -> None:
        """Forget clients whose buckets are full again."""
        whole = self._burst / self._rate
        if now - self._pruned > whole:
            self._pruned = now
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if now - bucket[1] < whole}
