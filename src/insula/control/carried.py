"""Writes that the first transaction of a request carries: what must be durable exactly if its change is.

`CarryingStore` is a store whose transactions ask the context that they run in (contextvars) for further writes. So
neither verbs nor the store know of them. The API has an intent for the audit log carried (api/outbox.py): a change and
the record of who makes it are committed as one, without a second fsync.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Protocol

from insula.store.protocol import Compare, Delete, Put, Store, Write


class Carried(Protocol):
    """What is to be carried. `writes` may raise an error, which then is that of the transaction, and returns nothing
    once they are `committed`."""

    def writes(self) -> Sequence[Write]: ...

    def committed(self) -> None: ...


current: ContextVar[Carried | None] = ContextVar("carried", default=None)
"""What the next transaction in this context carries."""


class CarryingStore:
    """A `Store` on top of another one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.get, self.list, self.watch = store.get, store.list, store.watch
        self.flush, self.close = store.flush, store.close
        self.grant, self.keep_alive, self.revoke = store.grant, store.keep_alive, store.revoke

    async def put(self, key: str, value: bytes, *, expect: int | None = None, lease: int | None = None) -> int:
        compares = [] if expect is None else [Compare(key, expect)]
        return await self.transact(compares, [Put(key, value, lease)])

    async def delete(self, key: str, *, expect: int | None = None) -> int:
        compares = [] if expect is None else [Compare(key, expect)]
        return await self.transact(compares, [Delete(key)])

    async def transact(self, compares: Sequence[Compare], writes: Sequence[Write], *, durable: bool = True) -> int:
        carried = current.get()
        more = carried.writes() if carried is not None and writes else ()
        if carried is None or not more:
            return await self._store.transact(compares, writes, durable=durable)
        revision = await self._store.transact(compares, [*writes, *more], durable=durable)
        carried.committed()
        return revision
