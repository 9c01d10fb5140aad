"""The retry loop of transactions that take names, numbers or quota (optimistic concurrency control).

`allocate` chooses names and numbers, and commits them together with the object that owns them. `guarded` is for a
change that depends on a tenant's usage. Both read the store anew for each attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from insula.control.allocation.reservations import Allocators, Reservation
from insula.control.keys import USAGE
from insula.control.workers import Locks
from insula.model.errors import Conflict
from insula.model.views import Usage
from insula.store.protocol import Compare, Store, TransactionConflict, Write
from insula.store.typed import Found

T = TypeVar("T")
_ATTEMPTS = 128
_turns: WeakKeyDictionary[Store, Locks] = WeakKeyDictionary()


@dataclass(frozen=True)
class Proposal(Generic[T]):
    """A new object, its reservations, and the compares and writes of the transaction that stores it."""

    value: T
    reservations: Sequence[Reservation]
    compares: Sequence[Compare]
    writes: Sequence[Write]


async def allocate(
    store: Store,
    allocators: Allocators,
    propose: Callable[[], Awaitable[Proposal[T]]],
    refuse: Callable[[str, T], None],
) -> Found[T]:
    """Commit the proposal that `propose` returns, with its reservations. Return the value and its revision.

    If a compared key was changed meanwhile, `refuse` is called with the key and the value. It raises an error
    for the user, or returns if another proposal may succeed. Reservations that are not committed are released.
    """

    async def attempt() -> Found[T]:
        proposal = await propose()
        own = proposal.reservations
        try:
            revision = await store.transact(
                [*proposal.compares, *(reservation.absent() for reservation in own)],
                [*proposal.writes, *(reservation.put() for reservation in own)],
            )
        except TransactionConflict as conflict:
            allocators.release(own)
            if any(reservation.key == conflict.key for reservation in own):
                allocators.invalidate(own)
            refuse(conflict.key, proposal.value)
            raise
        except BaseException:
            allocators.release(own)
            raise
        return Found(proposal.value, revision)

    return await retried(attempt)


async def guarded(store: Store, tenant: str, attempt: Callable[[Found[Usage]], Awaitable[T]]) -> T:
    """Call `attempt` with the tenant's guard (quotas.py). Retry while its transaction fails because the guard was
    changed."""

    async def with_guard() -> T:
        return await attempt(await guard(store, tenant))

    async with turn(store, tenant):
        return await retried(with_guard, USAGE.key(tenant))


def turn(store: Store, tenant: str) -> asyncio.Lock:
    """The lock under which this process changes a tenant's guard. Without it a hundred concurrent requests would make
    each other fail a hundred times."""
    return _turns.setdefault(store, Locks())[tenant]


async def guard(store: Store, tenant: str) -> Found[Usage]:
    """The tenant's usage and its revision, for a transaction that compares the revision."""
    return await USAGE.get(store, tenant) or Found(Usage(), 0)


async def retried(attempt: Callable[[], Awaitable[T]], key: str | None = None) -> T:
    """Call `attempt`, and retry while its transaction fails. With `key`, retry only if that key was changed."""
    for _ in range(_ATTEMPTS):
        try:
            return await attempt()
        except TransactionConflict as conflict:
            if key not in (None, conflict.key):
                raise
    raise Conflict("too many concurrent changes", "try again")
