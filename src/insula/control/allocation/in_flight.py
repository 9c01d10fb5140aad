"""`InFlight`: what the open requests of tenants hold of their quotas: sessions, streams, bytes of uploads.

It is in memory, because it ends with insulad: after a restart nothing is held. What a request takes is released when
the request has ended. Several daemons that share a store count separately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from insula.control.allocation.quotas import exceeded
from insula.model.objects import Limits
from insula.model.quota_settings import USERS
from insula.model.quotas import NOW, QUOTAS, Quota
from insula.model.views import Usage

_USER_STREAMS = next(quota for quota in USERS if quota.name == "user_streams")


class QuotaHolder(NamedTuple):
    """What holds something: "tenant NAME", or "user NAME"."""

    kind: str
    name: str


class Held:
    """What one request holds of one quota. `limit` returns the limit of now, None is no limit."""

    def __init__(
        self,
        held: Counter[tuple[QuotaHolder, str]],
        holder: QuotaHolder,
        quota: Quota,
        limit: Callable[[], float | None],
    ) -> None:
        self._held = held
        self._holder = holder
        self._quota = quota
        self._limit = limit
        self._amount = 0

    def take(self, amount: int = 1) -> None:
        """Take so much more. QuotaExceeded; then nothing more is taken."""
        key = self._holder, self._quota.name
        limit, used = self._limit(), self._held[key]
        if limit is not None and used + amount > limit:
            raise exceeded(" ".join(self._holder), self._quota, limit, used, amount)
        self._held[key] = used + amount
        self._amount += amount

    def release(self) -> None:
        """Give everything back."""
        key = self._holder, self._quota.name
        self._held[key] -= self._amount
        self._amount = 0
        if not self._held[key]:
            del self._held[key]


class InFlight:
    """`limits` returns those of a tenant. `user_streams` is the limit of a user's streams about no single tenant."""

    def __init__(self, limits: Callable[[str], Limits], user_streams: float | None) -> None:
        self._limits = limits
        self._user_streams = user_streams
        self._held: Counter[tuple[QuotaHolder, str]] = Counter()

    def of_tenant(self, tenant: str, name: str) -> Held:
        """Begin to hold the quota `name` of a tenant; nothing is taken yet."""
        return Held(
            self._held, QuotaHolder("tenant", tenant), QUOTAS[name], lambda: getattr(self._limits(tenant), name)
        )

    def of_user(self, user: str) -> Held:
        """Begin to hold a stream of a user."""
        return Held(self._held, QuotaHolder("user", user), _USER_STREAMS, lambda: self._user_streams)

    def complete(self, tenant: str, usage: Usage) -> Usage:
        """Return the usage with what is held now."""
        holder = QuotaHolder("tenant", tenant)
        held = {quota.name: self._held[holder, quota.name] for quota in NOW}
        return msgspec.structs.replace(usage, **held)
