"""Limits of rates by token buckets: a bucket holds up to `burst` tokens, and gets `rate` a second; an event takes one.

A bucket that is full is as none, so the memory is bounded: of more than `most` buckets the one that was used longest
ago is forgotten. Then its owner has a full one, and nobody has less.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from math import ceil

from insula.model.errors import TooManyRequests

BURST = 2.0
"""Seconds of its rate that a bucket holds."""
MOST = 10_000


class Buckets:
    """Buckets by key. `clock` is in seconds, and never goes back."""

    def __init__(self, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._levels: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # tokens, and when; last used last

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, key: Hashable, rate: float, burst: float) -> float:
        """Take a token. Return 0.0, or the seconds until there is one; then none is taken."""
        now = self._clock()
        found = self._levels.get(key)
        level = burst if found is None else min(burst, found[0] + (now - found[1]) * rate)
        wait = 0.0 if level >= 1.0 else (1.0 - level) / rate
        self._levels[key] = (level if wait else level - 1.0), now
        self._levels.move_to_end(key)
        if len(self._levels) > self._most:
            self._levels.popitem(last=False)
        return wait


class Rates:
    """The rates of requests of principals and tenants, and of failed authentications of sources. A limit of None is no
    limit. `check_…` raise TooManyRequests."""

    FAILURES, FAILURES_BURST = 1.0, 60.0
    """Failed authentications a second of one source, and at once."""
    ANONYMOUS = 10.0
    """Requests a second of one source that take no proof."""

    def __init__(self, of_principal: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._of_principal = of_principal
        self._requests = Buckets(clock=clock)
        self._failures = Buckets(clock=clock)

    def check_principal(self, principal: str) -> None:
        """Count a request of the principal with this ID."""
        if self._of_principal is not None:
            self._check(("principal", principal), self._of_principal, "you send")

    def check_anonymous(self, source: Hashable) -> None:
        """Count a request that takes no proof."""
        self._check(("source", source), self.ANONYMOUS, "you send")

    def check_tenant(self, tenant: str, limit: float | None) -> None:
        """Count a request of a member of a tenant about the tenant."""
        if limit is not None:
            self._check(("tenant", tenant), limit, f"the members of tenant {tenant} send")

    def _check(self, key: Hashable, rate: float, who: str) -> None:
        wait = self._requests.take(key, rate, BURST * rate)
        if wait:
            what = "request" if rate == 1 else "requests"
            raise TooManyRequests(f"{who} more than {rate:g} {what} a second", retry_after=ceil(wait))

    def check_failure(self, source: Hashable) -> None:
        """Count a failed authentication."""
        wait = self._failures.take(source, self.FAILURES, self.FAILURES_BURST)
        if wait:
            raise TooManyRequests("too many failed attempts come from where you are", retry_after=ceil(wait))
