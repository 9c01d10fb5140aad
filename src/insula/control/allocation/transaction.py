"""The transaction that takes something of which there is only so much, tried again while others are faster.

`allocate` chooses names and numbers, and commits them together with the object that owns them. `guarded` is for a
change that depends on what a tenant has. Both decide anew in each attempt, on what the store has then (optimistic
concurrency control).
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
    """A new object, what it reserves, and the transaction that makes it."""

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
    """Commit what `propose` returns, with its reservations; the value and the revision.

    Somebody else may have changed a key that the transaction compares. `refuse` is told the key and the value; it
    raises what the user should know, or returns if another proposal may succeed. What was reserved is released unless
    it was committed.
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

    return await _retried(attempt)


async def guarded(store: Store, tenant: str, attempt: Callable[[Found[Usage]], Awaitable[T]]) -> T:
    """`attempt` with the tenant's guard (quotas.py), again while its transaction fails because that was changed."""

    async def with_guard() -> T:
        return await attempt(await guard(store, tenant))

    async with turn(store, tenant):
        return await _retried(with_guard, USAGE.key(tenant))


def turn(store: Store, tenant: str) -> asyncio.Lock:
    """The lock under which those of this process change what a tenant has, one after the other: a hundred at once
    would else make each other fail a hundred times."""
    return _turns.setdefault(store, Locks())[tenant]


async def guard(store: Store, tenant: str) -> Found[Usage]:
    """The tenant's usage as it is now, for a transaction that compares its revision."""
    return await USAGE.get(store, tenant) or Found(Usage(), 0)


async def _retried(attempt: Callable[[], Awaitable[T]], key: str | None = None) -> T:
    """`attempt`, again while its transaction fails; with `key` only while it fails because of that one."""
    for _ in range(_ATTEMPTS):
        try:
            return await attempt()
        except TransactionConflict as conflict:
            if key not in (None, conflict.key):
                raise
    raise Conflict("too many concurrent changes", "try again")
