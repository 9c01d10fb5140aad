"""Names and numbers that only one may have: addresses, MAC addresses, VNIs, indices of devices.

A claim is a key that is created and never overwritten: `/claims/vni/4097` holds the name of its owner. The
transaction that makes an object creates its claims, comparing each with revision 0, so two objects can never
share one, whatever raced. What is chosen automatically comes from a `Pool`, which remembers what is taken; if
somebody else was faster, the pool is told to look again and the transaction is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from random import SystemRandom
from typing import NamedTuple, TypeVar

from insula.model.errors import Conflict
from insula.store.protocol import Compare, Delete, Put, Store, TransactionConflict, Write

T = TypeVar("T")
ATTEMPTS = 16
_RANDOM = SystemRandom()


class Claim(NamedTuple):
    """`value` of `kind` belongs to `owner`, which is text for people."""

    kind: str
    value: str
    owner: str

    @property
    def key(self) -> str:
        return f"/claims/{self.kind}/{self.value}"


def take(claims: Iterable[Claim]) -> tuple[list[Compare], list[Write]]:
    """What a transaction compares and writes to own them."""
    claims = list(claims)
    return [Compare(c.key, 0) for c in claims], [Put(c.key, c.owner.encode()) for c in claims]


def release(claims: Iterable[Claim]) -> list[Write]:
    return [Delete(claim.key) for claim in claims]


class Pool:
    """What is taken of one kind, as this process knows it: read from the store once, then kept up to date by those
    who take and give back. Values are reserved as soon as they are chosen, so that two who choose at the same time
    choose differently."""

    def __init__(self, store: Store, kind: str) -> None:
        self.store = store
        self.kind = kind
        self._taken: set[str] | None = None

    async def choose(self, pick: Callable[[set[str]], str]) -> str:
        """Reserves what `pick` chooses, given what is taken. What `pick` raises goes on to the caller."""
        if self._taken is None:
            prefix = f"/claims/{self.kind}/"
            snapshot = await self.store.list(prefix)
            if self._taken is None:  # somebody else may have read it meanwhile
                self._taken = {entry.key[len(prefix) :] for entry in snapshot.entries}
        value = pick(self._taken)
        self._taken.add(value)
        return value

    async def lowest(self, start: int, end: int, what: str) -> int:
        """The lowest free number from `start` up to but not including `end`; Conflict when there is none."""

        def pick(taken: set[str]) -> str:
            number = next(n for n in count(start) if str(n) not in taken)
            if number >= end:
                raise Conflict(f"all {end - start} {what} are in use", "remove what you don't need")
            return str(number)

        return int(await self.choose(pick))

    async def random(self, end: int, what: str) -> int:
        """A free number below `end`, which tells nobody how many others there are; Conflict when there is none."""

        def pick(taken: set[str]) -> str:
            if len(taken) >= end:
                raise Conflict(f"all {end} {what} are in use", "remove what you don't need")
            return next(text for text in iter(lambda: str(_RANDOM.randrange(end)), "") if text not in taken)

        return int(await self.choose(pick))

    def give_back(self, value: str) -> None:
        """It is free again (or was never committed)."""
        if self._taken is not None:
            self._taken.discard(value)

    def forget(self) -> None:
        """Read the store again at the next choice."""
        self._taken = None


async def commit(
    store: Store,
    claims: Sequence[Claim],
    compares: Sequence[Compare],
    writes: Sequence[Write],
) -> int:
    """The transaction with the claims in it. Raises TransactionConflict."""
    free, owned = take(claims)
    return await store.transact([*compares, *free], [*writes, *owned])


def lost(conflict: TransactionConflict, claims: Iterable[Claim]) -> Claim | None:
    """Which of the claims somebody else had, if that is why the transaction failed."""
    return next((claim for claim in claims if claim.key == conflict.key), None)
