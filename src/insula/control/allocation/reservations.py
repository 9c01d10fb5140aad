"""Names and numbers that only one owner may have: addresses, MAC addresses, VNIs, indices of devices.

A reservation is a key that is created and never overwritten: `/claims/vni/4097` holds the name of its owner. The
transaction that makes an object creates its reservations, comparing each with revision 0. So two objects can never
share a value. An `Allocator` chooses free values, and caches which are taken. If another daemon took a value first,
the allocator reads the store again (`invalidate`), and the transaction is retried (transaction.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from random import SystemRandom
from typing import NamedTuple

from insula.model.errors import Conflict
from insula.store.protocol import Compare, Delete, Put, Store

_RANDOM = SystemRandom()


class Reservation(NamedTuple):
    """A reservation: `value` of `kind` belongs to `owner`, such as TENANT/NETWORK."""

    kind: str
    value: str
    owner: str

    @property
    def key(self) -> str:
        return f"/claims/{self.kind}/{self.value}"

    def absent(self) -> Compare:
        return Compare(self.key, 0)

    def put(self) -> Put:
        return Put(self.key, self.owner.encode())

    def delete(self) -> Delete:
        return Delete(self.key)


class Allocator:
    """Chooses free values of one kind. The taken values are read from the store once, and then kept up to date.

    A value counts as taken as soon as it is chosen, so that concurrent requests get different ones.
    """

    def __init__(self, store: Store, kind: str) -> None:
        self.store = store
        self.kind = kind
        self._taken: set[str] | None = None

    async def choose(self, pick: Callable[[set[str]], str]) -> str:
        """Take the value that `pick` chooses and return it. `pick` is called with the taken values; its exceptions are
        passed on."""
        taken = await self.taken()
        value = pick(taken)
        taken.add(value)
        return value

    async def taken(self) -> set[str]:
        """Return the taken values, which the caller must not change."""
        if self._taken is None:
            prefix = f"/claims/{self.kind}/"
            snapshot = await self.store.list(prefix)
            if self._taken is None:  # another task may have read them meanwhile
                self._taken = {entry.key[len(prefix) :] for entry in snapshot.entries}
        return self._taken

    async def lowest(self, start: int, end: int, what: str) -> int:
        """The lowest free number from `start` up to but not including `end`; Conflict when there is none."""

        def pick(taken: set[str]) -> str:
            number = next(n for n in count(start) if str(n) not in taken)
            if number >= end:
                raise Conflict(f"all {end - start} {what} are in use", "remove what you don't need")
            return str(number)

        return int(await self.choose(pick))

    async def random(self, end: int, what: str) -> int:
        """A random free number below `end`; it does not reveal how many are taken. Conflict when there is none."""

        def pick(taken: set[str]) -> str:
            if len(taken) >= end:
                raise Conflict(f"all {end} {what} are in use", "remove what you don't need")
            return next(text for text in iter(lambda: str(_RANDOM.randrange(end)), "") if text not in taken)

        return int(await self.choose(pick))

    def release(self, value: str) -> None:
        """Make a value free again that was deleted or never committed."""
        if self._taken is not None:
            self._taken.discard(value)

    def invalidate(self) -> None:
        """Read the store again at the next choice."""
        self._taken = None


class Allocators:
    """The allocators of one store, one for each kind."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._of: dict[str, Allocator] = {}

    def of(self, kind: str) -> Allocator:
        if kind not in self._of:
            self._of[kind] = Allocator(self._store, kind)
        return self._of[kind]

    def drop(self, kind: str) -> None:
        """Drop the allocator of a kind that is no longer used."""
        self._of.pop(kind, None)

    def release(self, reservations: Iterable[Reservation]) -> None:
        """Make values free again whose reservations were deleted or never committed."""
        for reservation in reservations:
            self.of(reservation.kind).release(reservation.value)

    def invalidate(self, reservations: Iterable[Reservation]) -> None:
        """Have the allocators of these reservations read the store again: another daemon took one of the values."""
        for reservation in reservations:
            self.of(reservation.kind).invalidate()
