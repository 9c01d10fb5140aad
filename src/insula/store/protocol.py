"""What Insula asks of the place that holds its state.

The model is etcd's: a flat map from keys to values in which every change has a *revision*, one number that rises
by one with each transaction. Three things follow from it, and everything else in Insula is built on them:

- *Optimistic concurrency*: an entry tells the revision of its last change; a write that states the revision it
  has seen is refused when somebody was faster. Revision 0 says "must not exist", which makes a key a unique
  constraint: whoever creates `/addresses/acme/net/10.0.0.2` first owns the address.
- *Transactions*: many comparisons and many writes, all or nothing, one revision.
- *Watching without gaps*: list a prefix, which tells the revision of that picture, then watch from there.

A *lease* ties keys to somebody's life: they vanish when it isn't kept alive for its time to live.

Keys are printable ASCII and begin with "/". Every implementation passes the conformance suite in
tests/unit/test_store_conformance.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

import msgspec

from insula.model.errors import Conflict, Invalid
from insula.model.units import shorten

MAX_KEY = 1024
MAX_VALUE = 1 << 20


class Entry(msgspec.Struct, frozen=True):
    """`revision` is that of the last change, `created` that of the creation."""

    key: str
    value: bytes
    revision: int
    created: int


class Put(msgspec.Struct, frozen=True):
    """Create or replace. The key belongs to `lease` from now on, or to none."""

    key: str
    value: bytes
    lease: int | None = None


class Delete(msgspec.Struct, frozen=True):
    """Remove; a key that doesn't exist is no error and no change."""

    key: str


Write = Put | Delete


class Compare(msgspec.Struct, frozen=True):
    """Holds when the key's last change was `revision`; 0 means that it must not exist."""

    key: str
    revision: int


class Event(msgspec.Struct, frozen=True):
    """One change. The entry of a delete has an empty value, and the revision of the deletion."""

    kind: Literal["put", "delete"]
    entry: Entry
    previous: Entry | None
    revision: int


class Snapshot(msgspec.Struct, frozen=True):
    """Entries in key order, as they were all at once at `revision`; watch from there."""

    entries: list[Entry]
    revision: int


class TransactionConflict(Conflict):
    """A comparison failed: nothing was changed. `key` is the first that differs."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} was changed by somebody else", "try again")
        self.key = key


class Compacted(Conflict):
    """Changes that old are forgotten: list again and watch from there."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"the history after revision {revision} is no longer kept", "list again")


class Store(Protocol):
    """Durable when it returns: a change that was answered survives a crash of the process and of the host."""

    async def get(self, key: str) -> Entry | None: ...

    async def list(self, prefix: str) -> Snapshot: ...

    async def put(self, key: str, value: bytes, *, expect: int | None = None, lease: int | None = None) -> int:
        """The new revision. `expect` as in `Compare`. Raises TransactionConflict, NotFound (lease)."""
        ...

    async def delete(self, key: str, *, expect: int | None = None) -> int:
        """The revision afterwards. `expect` as in `Compare`. Raises TransactionConflict."""
        ...

    async def transact(self, compares: Sequence[Compare], writes: Sequence[Write]) -> int:
        """All or nothing, under one new revision, which it returns; the current one when nothing changes.

        Raises TransactionConflict naming the first comparison that fails, Invalid when a key is written twice,
        NotFound for a lease that is over, Failed when it can't be made durable (a full disk).
        """
        ...

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Event]:
        """Every change after that revision, in order, without end. Raises Compacted when it's too old."""
        ...

    async def grant(self, ttl: float) -> int:
        """A lease of `ttl` seconds. Leases restart their time when the store restarts."""
        ...

    async def keep_alive(self, lease: int) -> None:
        """Starts the lease's time anew. Raises NotFound when it's over."""
        ...

    async def revoke(self, lease: int) -> None:
        """Ends the lease and deletes its keys. A lease that is over already is no error."""
        ...

    async def close(self) -> None: ...


def check_key(key: str) -> str:
    """`key` if it is fit to be one, else Invalid."""
    if not key.startswith("/") or len(key) > MAX_KEY or not all("!" <= c <= "~" for c in key):
        raise Invalid(f"{shorten(key)} is no key of the store", "use printable ASCII without blanks")
    return key


def check_writes(writes: Sequence[Write]) -> None:
    """Raises Invalid when a key is bad or written twice, or a value is too large."""
    seen: set[str] = set()
    for write in writes:
        if check_key(write.key) in seen:
            raise Invalid(f"{shorten(write.key)} is written twice in one transaction")
        if isinstance(write, Put) and len(write.value) > MAX_VALUE:
            raise Invalid(f"the value of {shorten(write.key)} exceeds {MAX_VALUE} bytes", "make it smaller")
        seen.add(write.key)
