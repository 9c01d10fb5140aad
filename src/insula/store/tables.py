"""The SQLite store's tables, used from one thread.

`entries` is the present, `changes` the history that watchers read, `leases` the times to live, `counters` the one
row with the current revision and the one up to which history was forgotten. Nothing here commits: the caller opens
a transaction around any number of calls, `mark`s the state in memory before it and `restore`s it when SQLite rolls
back.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from insula.model.errors import Conflict, Failed, InsulaError, NotFound, Unavailable
from insula.store.migrations import STEPS, Step, migrate
from insula.store.protocol import (
    Compacted,
    Compare,
    Delete,
    Entry,
    Event,
    Put,
    Snapshot,
    TransactionConflict,
    Write,
)

_ABOVE = "\x7f"
"""Sorts after every character that a key may hold."""


class Mark(NamedTuple):
    """What `Tables` keeps in memory, to go back to."""

    revision: int
    compacted: int
    events: int
    deadlines: dict[int, float]


class Tables:
    """`events` collects what was changed since it was last emptied. Deadlines of leases are monotonic times and not
    in the file: a restart gives every lease its full time again, for its owner could not reach us meanwhile."""

    def __init__(self, path: Path, history: int, steps: Sequence[Step] = STEPS) -> None:
        self.history = history
        self.connection = _connect(path, steps)
        row: tuple[int, int] = self.connection.execute("SELECT revision, compacted FROM counters").fetchone()
        self.revision, self.compacted = row
        self.events: list[Event] = []
        now = time.monotonic()
        leases = self.connection.execute("SELECT id, ttl FROM leases")
        self.deadlines: dict[int, float] = {lease: now + ttl for lease, ttl in leases}

    def mark(self) -> Mark:
        return Mark(self.revision, self.compacted, len(self.events), dict(self.deadlines))

    def restore(self, mark: Mark) -> None:
        self.revision, self.compacted, count, self.deadlines = mark
        del self.events[count:]

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        row = self.connection.execute(
            "SELECT key, value, revision, created FROM entries WHERE key = ?", (key,)
        ).fetchone()
        return Entry(*row) if row else None

    def scan(self, prefix: str) -> Snapshot:
        rows = self.connection.execute(
            "SELECT key, value, revision, created FROM entries WHERE key >= ? AND key < ? ORDER BY key",
            (prefix, prefix + _ABOVE),
        )
        return Snapshot([Entry(*row) for row in rows], self.revision)

    def changes(self, prefix: str, after: int) -> list[Event]:
        """All changes after that revision. Raises Compacted when not all of them are kept."""
        if after < self.compacted:
            raise Compacted(after)
        rows = self.connection.execute(
            "SELECT revision, kind, key, value, created, previous_value, previous_revision, previous_created"
            " FROM changes WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision, position",
            (after, prefix, prefix + _ABOVE),
        )
        return [
            Event(
                kind,
                Entry(key, value, revision, created),
                None if old_revision is None else Entry(key, old_value, old_revision, old_created),
                revision,
            )
            for revision, kind, key, value, created, old_value, old_revision, old_created in rows
        ]

    # -- writing -------------------------------------------------------------------------------------------------

    def transact(self, compares: Sequence[Compare], writes: Sequence[Write]) -> int:
        """As `Store.transact`, but on an error the caller rolls back."""
        for compare in compares:
            entry = self.get(compare.key)
            if (entry.revision if entry else 0) != compare.revision:
                raise TransactionConflict(compare.key)
        revision = self.revision + 1
        changed = [event for write in writes if (event := self._apply(write, revision))]
        for position, event in enumerate(changed):
            self._record(event, position)
        if changed:
            self.revision = revision
        return self.revision

    def _apply(self, write: Write, revision: int) -> Event | None:
        previous = self.get(write.key)
        if isinstance(write, Put):
            if write.lease is not None and write.lease not in self.deadlines:
                raise NotFound(f"lease {write.lease} is over", "take a new one")
            entry = Entry(write.key, write.value, revision, previous.created if previous else revision)
            self.connection.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)",
                (entry.key, entry.value, entry.revision, entry.created, write.lease),
            )
            return Event("put", entry, previous, revision)
        if previous is None:
            return None
        self.connection.execute("DELETE FROM entries WHERE key = ?", (write.key,))
        return Event("delete", Entry(write.key, b"", revision, previous.created), previous, revision)

    def _record(self, event: Event, position: int) -> None:
        entry, previous = event.entry, event.previous
        old = (previous.value, previous.revision, previous.created) if previous else (None, None, None)
        self.connection.execute(
            "INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (event.revision, position, event.kind, entry.key, entry.value, entry.created, *old),
        )
        self.events.append(event)

    def save_counters(self) -> None:
        """Before a commit: keeps the revision, and forgets history in large steps."""
        if self.revision - self.compacted >= 2 * self.history:
            self.compacted = self.revision - self.history
            self.connection.execute("DELETE FROM changes WHERE revision <= ?", (self.compacted,))
        self.connection.execute("UPDATE counters SET revision = ?, compacted = ?", (self.revision, self.compacted))

    # -- leases --------------------------------------------------------------------------------------------------

    def grant(self, ttl: float) -> int:
        lease = self.connection.execute("INSERT INTO leases (ttl) VALUES (?)", (ttl,)).lastrowid
        assert lease is not None
        self.deadlines[lease] = time.monotonic() + ttl
        return lease

    def keep_alive(self, lease: int) -> None:
        now = time.monotonic()
        if self.deadlines.get(lease, now) <= now:
            raise NotFound(f"lease {lease} is over", "take a new one")
        (ttl,) = self.connection.execute("SELECT ttl FROM leases WHERE id = ?", (lease,)).fetchone()
        self.deadlines[lease] = now + ttl

    def revoke(self, lease: int) -> None:
        keys = self.connection.execute("SELECT key FROM entries WHERE lease = ? ORDER BY key", (lease,)).fetchall()
        self.transact([], [Delete(key) for (key,) in keys])
        self.connection.execute("DELETE FROM leases WHERE id = ?", (lease,))
        self.deadlines.pop(lease, None)

    def expire(self, lease: int) -> bool:
        """Revokes the lease if its time is up; True when it is over."""
        if self.deadlines.get(lease, 0.0) > time.monotonic():
            return False
        self.revoke(lease)
        return True


def _connect(path: Path, steps: Sequence[Step]) -> sqlite3.Connection:
    try:
        path.touch(mode=0o600)
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.2)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")  # takes the lock that locking_mode then keeps
            connection.execute("COMMIT")
            migrate(connection, steps)
        except BaseException:
            connection.close()
            raise
    except (sqlite3.Error, OSError) as error:
        raise explain(error, path) from error
    return connection


def explain(error: sqlite3.Error | OSError, path: Path) -> InsulaError:
    """SQLite's errors in terms of what to do about them."""
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return Failed("the disk that holds the state is full", f"free some space below {path.parent}")
    if code == sqlite3.SQLITE_BUSY:
        return Conflict(f"{path} is in use by another process", "stop the other daemon first")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return Unavailable(f"{path} is no database", "restore it, or move it away to begin anew")
    return Failed(f"the state can't be kept in {path}: {error}", "look at the disk that holds it")
