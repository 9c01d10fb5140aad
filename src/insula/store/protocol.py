"""The protocol of a store.

The model is etcd's: a flat map from keys to values. Every transaction has a *revision*, a number that increases by one.
Insula uses three properties:

- *Optimistic concurrency*: an entry has the revision of its last change. A write that names an expected revision fails
  if the entry has changed since. The expected revision 0 means that the key must not exist, which makes a key a unique
  constraint: the first transaction that creates `/addresses/acme/net/10.0.0.2` gets the address.
- *Transactions*: comparisons and writes that are applied as a whole or not at all, with one revision.
- *Watches without gaps*: listing a prefix returns a revision, and a watch from it returns every later change.

The keys of a *lease* are deleted when it isn't kept alive for its time to live.

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
    """A key and its value. `revision` is that of the last change, `created` that of the creation."""

    key: str
    value: bytes
    revision: int
    created: int


class Put(msgspec.Struct, frozen=True):
    """Create or replace an entry. The key then belongs to `lease`, or to none."""

    key: str
    value: bytes
    lease: int | None = None


class Delete(msgspec.Struct, frozen=True):
    """Delete an entry; a key that doesn't exist is no error and no change."""

    key: str


Write = Put | Delete


class Compare(msgspec.Struct, frozen=True):
    """A condition: the key's last change is `revision`; 0 means that it must not exist."""

    key: str
    revision: int


class Event(msgspec.Struct, frozen=True):
    """A change. The entry of a deletion has an empty value, and the revision of the deletion."""

    kind: Literal["put", "delete"]
    entry: Entry
    previous: Entry | None
    revision: int


class Snapshot(msgspec.Struct, frozen=True):
    """A consistent list of entries at `revision`, in key order; watch from there."""

    entries: list[Entry]
    revision: int


class TransactionConflict(Conflict):
    """A comparison failed, and nothing was changed. `key` is the first that differs."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} was changed meanwhile", "try again")
        self.key = key


class Compacted(Conflict):
    """The history of changes does not reach back that far: list again and watch from there."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"the history after revision {revision} is no longer kept", "list again")


class Store(Protocol):
    """A store. A change is durable when the call returns: it survives a crash of the process and of the host."""

    async def get(self, key: str) -> Entry | None: ...

    async def list(self, prefix: str) -> Snapshot: ...

    async def put(self, key: str, value: bytes, *, expect: int | None = None, lease: int | None = None) -> int:
        """Write an entry; returns the new revision. `expect` as in `Compare`. TransactionConflict, NotFound (lease)."""
        ...

    async def delete(self, key: str, *, expect: int | None = None) -> int:
        """Delete an entry; returns the new revision. `expect` as in `Compare`. TransactionConflict."""
        ...

    async def transact(self, compares: Sequence[Compare], writes: Sequence[Write], *, durable: bool = True) -> int:
        """Apply all writes if all comparisons hold; returns the new revision, or the current one if nothing changes.

        If it is not `durable`, it survives any end of this process, but may be lost with the host's power until the
        next durable one, or `flush`. No later transaction survives without it.

        TransactionConflict with the first comparison that fails, Invalid if a key is written twice, NotFound for an
        expired lease, Failed if the change can't be made durable (a full disk).
        """
        ...

    async def flush(self) -> None:
        """Make earlier transactions durable. Failed."""
        ...

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Event]:
        """Yield every change after `revision`, in order, without end. Compacted if the revision is too old."""
        ...

    async def grant(self, ttl: float) -> int:
        """Make a lease of `ttl` seconds. When the store restarts, leases get their full time again."""
        ...

    async def keep_alive(self, lease: int) -> None:
        """Renew a lease for its full time. NotFound if it has expired."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; no error if it has expired."""
        ...

    async def close(self) -> None: ...


def check_key(key: str) -> str:
    """Return `key` if it is valid, else raise Invalid."""
    if not key.startswith("/") or len(key) > MAX_KEY or not (key.isascii() and key.isprintable()) or " " in key:
        raise Invalid(f"{shorten(key)} is not a valid key", "use printable ASCII without blanks")
    return key


def check_writes(writes: Sequence[Write]) -> None:
    """Check writes: Invalid if a key is malformed or written twice, or a value is too large."""
    seen: set[str] = set()
    for write in writes:
        if check_key(write.key) in seen:
            raise Invalid(f"{shorten(write.key)} is written twice in one transaction")
        if isinstance(write, Put) and len(write.value) > MAX_VALUE:
            raise Invalid(f"the value of {shorten(write.key)} exceeds {MAX_VALUE} bytes", "make it smaller")
        seen.add(write.key)
