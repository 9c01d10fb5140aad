"""The SQLite store's tables, used by one thread.

`entries` has the current entries, `changes` the history for watchers, `leases` the times to live, and `counters` one
row with the current revision and the revision up to which history was deleted. Nothing here commits: the caller opens
a transaction around any number of calls with `begin`, saves the state in memory before it with `mark`, and `restore`s
it after a rollback.

Each statement costs about the same, however many rows it has: the driver gives up the interpreter's lock for it, and
takes it back from the event loop. So a transaction has few statements, of many rows, and reads only what is not cached.
"""

from __future__ import annotations

import functools
import sqlite3
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from insula.model.errors import Conflict, Failed, InsulaError, NotFound, Unavailable
from insula.store.migrations import STEPS, Migration, migrate
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
from insula.store.recent import Recent

T = TypeVar("T")
_ABOVE = "\x7f"
"""A character that sorts after every character of a key."""


ROW = 512
"""Bytes that a change counts in addition to its values."""
_ROWS = 16  # of one statement; each number of rows is a statement of its own, which is prepared once
_STATEMENTS = 5 * _ROWS
_PIECES = 64  # of a full history; each is deleted as a whole


class Piece(NamedTuple):
    """A part of the history: its first and last revision, and its size in bytes."""

    first: int
    last: int
    size: int


class Mark(NamedTuple):
    """A copy of the state that `Tables` keeps in memory."""

    revision: int
    compacted: int
    events: int
    deadlines: dict[int, float]
    pieces: tuple[Piece, ...]


class Tables:
    """The tables. `events` collects the changes since `begin`. `recent` is a cache of committed entries.

    Deadlines of leases are monotonic times and not in the file: after a restart every lease gets its full time again,
    because its owner could not renew it meanwhile. The history has the last `history` revisions, and fewer if their
    values have more than `history_bytes` together.
    """

    def __init__(
        self, path: Path, history: int, history_bytes: int, recent: Recent, steps: Sequence[Migration] = STEPS
    ) -> None:
        self.history, self.history_bytes = history, history_bytes
        self.recent = recent
        self.connection = _connect(path, steps)
        row: tuple[int, int] = self.connection.execute("SELECT revision, compacted FROM counters").fetchone()
        self.revision, self.compacted = row
        self.events: list[Event] = []
        self._changed: dict[str, Entry | None] = {}  # by `events`
        now = time.monotonic()
        leases = self.connection.execute("SELECT id, ttl FROM leases")
        self.deadlines: dict[int, float] = {lease: now + ttl for lease, ttl in leases}
        self._pieces: deque[Piece] = deque()
        sizes = (
            "SELECT revision, ? + length(value) + coalesce(length(previous_value), 0) FROM changes ORDER BY revision"
        )
        for revision, size in self.connection.execute(sizes, (ROW,)):
            self._measure(revision, size)

    def begin(self) -> None:
        """Forget the changes of the last transaction, which was committed or rolled back."""
        self.events, self._changed = [], {}

    def mark(self) -> Mark:
        return Mark(self.revision, self.compacted, len(self.events), dict(self.deadlines), tuple(self._pieces))

    def restore(self, mark: Mark) -> None:
        self.revision, self.compacted, count, self.deadlines, pieces = mark
        self._pieces = deque(pieces)
        del self.events[count:]
        self._changed.clear()
        self._note(self.events)

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        return self.get_all((key,))[key]

    def get_all(self, keys: Collection[str]) -> dict[str, Entry | None]:
        """Return the entries of these keys in the file; None where there is none."""
        found: dict[str, Entry | None] = dict.fromkeys(keys)
        for some in _in_batches([*found]):
            for row in self.connection.execute(_select(len(some)), some):
                found[row[0]] = Entry(*row)
        return found

    def _current(self, keys: Collection[str]) -> dict[str, Entry | None]:
        """Return the entries of these keys as the open transaction sees them."""
        known: dict[str, Entry | None] = {}
        unknown = []
        for key in keys:
            try:
                known[key] = self._changed[key] if key in self._changed else self.recent[key]
            except KeyError:
                unknown.append(key)
        return known | self.get_all(unknown) if unknown else known

    def scan(self, prefix: str) -> Snapshot:
        rows = self.connection.execute(
            "SELECT key, value, revision, created FROM entries WHERE key >= ? AND key < ? ORDER BY key",
            (prefix, prefix + _ABOVE),
        )
        return Snapshot([Entry(*row) for row in rows], self.revision)

    def changes(self, prefix: str, after: int, most: int) -> tuple[list[Event], bool]:
        """Return changes after a revision, and whether there are more: whole revisions of at most `most` bytes.

        Compacted if some of the changes were deleted.
        """
        if after < self.compacted:
            raise Compacted(after)
        rows = self.connection.execute(
            "SELECT revision, kind, key, value, created, previous_value, previous_revision, previous_created"
            " FROM changes WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision, position",
            (after, prefix, prefix + _ABOVE),
        )
        found: list[Event] = []
        size = 0
        for revision, kind, key, value, created, old_value, old_revision, old_created in rows:
            if size >= most and revision != found[-1].revision:
                rows.close()
                return found, True
            previous = None if old_revision is None else Entry(key, old_value, old_revision, old_created)
            found.append(Event(kind, Entry(key, value, revision, created), previous, revision))
            size += size_of(found[-1])
        return found, False

    # -- writing -------------------------------------------------------------------------------------------------

    def transact(self, compares: Sequence[Compare], writes: Sequence[Write]) -> int:
        """Do `Store.transact`; on an error the caller rolls back."""
        found = self._current({each.key for each in (*compares, *writes)})
        for compare in compares:
            entry = found[compare.key]
            if (entry.revision if entry else 0) != compare.revision:
                raise TransactionConflict(compare.key)
        revision, leases = self.revision + 1, {}
        events = []
        for write in writes:
            previous = found[write.key]
            if isinstance(write, Put):
                if write.lease is not None and write.lease not in self.deadlines:
                    raise NotFound(f"lease {write.lease} is over", "take a new one")
                leases[write.key] = write.lease
                entry = Entry(write.key, write.value, revision, previous.created if previous else revision)
                events.append(Event("put", entry, previous, revision))
            elif previous:
                events.append(Event("delete", Entry(write.key, b"", revision, previous.created), previous, revision))
        if events:
            self._write(events, leases)
            self._note(events)
            self.events += events
            self.revision = revision
        return self.revision

    def _write(self, events: Sequence[Event], leases: dict[str, int | None]) -> None:
        """Write changes of one revision to `entries` and to `changes`. `leases` are those of the entries put."""
        puts, deletes, rows = [], [], []
        for position, event in enumerate(events):
            entry, previous = event.entry, event.previous
            old = (previous.value, previous.revision, previous.created) if previous else (None, None, None)
            rows.append((event.revision, position, event.kind, entry.key, entry.value, entry.created, *old))
            if event.kind == "put":
                puts.append((entry.key, entry.value, entry.revision, entry.created, leases[entry.key]))
            else:
                deletes.append(entry.key)
        for some in _in_batches(deletes):
            self.connection.execute(_delete(len(some)), some)
        for table, those in (("entries", puts), ("changes", rows)):
            for batch in _in_batches(those):
                values = [value for row in batch for value in row]
                self.connection.execute(_insert(table, len(batch), len(batch[0])), values)

    def _note(self, events: Sequence[Event]) -> None:
        for event in events:
            self._changed[event.entry.key] = event.entry if event.kind == "put" else None

    def save_counters(self) -> None:
        """Save the counters before a commit, and delete old history, piece by piece.

        One commit deletes twice the size of the new changes, or a 16th of the whole, so that a commit doesn't take long
        even if a file has far too much history.
        """
        added = 0
        for event in self.events:
            self._measure(event.revision, size_of(event))
            added += size_of(event)
        size, forgotten = sum(piece.size for piece in self._pieces), 0
        most = max(2 * added, self.history_bytes // 16)
        while self._pieces and forgotten <= most:
            piece = self._pieces[0]
            if size <= self.history_bytes and self.revision - piece.last < self.history:
                break
            self._pieces.popleft()
            size, forgotten, self.compacted = size - piece.size, forgotten + piece.size, piece.last
        if forgotten:
            self.connection.execute("DELETE FROM changes WHERE revision <= ?", (self.compacted,))
        self.connection.execute("UPDATE counters SET revision = ?, compacted = ?", (self.revision, self.compacted))

    def _measure(self, revision: int, size: int) -> None:
        """Add the bytes of the newest revision to the last piece, or to a new one if that is full."""
        last = self._pieces[-1] if self._pieces else None
        small = last and last.size < self.history_bytes // _PIECES and revision - last.first < self.history // _PIECES
        if last and (small or last.last == revision):
            self._pieces[-1] = Piece(last.first, revision, last.size + size)
        else:
            self._pieces.append(Piece(revision, revision, size))

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
        """Revoke a lease if its time is over; returns whether it has ended."""
        if self.deadlines.get(lease, 0.0) > time.monotonic():
            return False
        self.revoke(lease)
        return True


def _in_batches(some: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield parts of at most `_ROWS`."""
    for start in range(0, len(some), _ROWS):
        yield some[start : start + _ROWS]


@functools.cache
def _select(count: int) -> str:
    return f"SELECT key, value, revision, created FROM entries WHERE key IN ({_marks(count)})"


@functools.cache
def _delete(count: int) -> str:
    return f"DELETE FROM entries WHERE key IN ({_marks(count)})"


@functools.cache
def _insert(table: str, rows: int, columns: int) -> str:
    row = f"({_marks(columns)})"
    return f"INSERT OR REPLACE INTO {table} VALUES {', '.join([row] * rows)}"


def _marks(count: int) -> str:
    return ", ".join("?" * count)


def size_of(event: Event) -> int:
    """Return the approximate size in bytes."""
    return ROW + len(event.entry.value) + (len(event.previous.value) if event.previous else 0)


def _connect(path: Path, steps: Sequence[Migration]) -> sqlite3.Connection:
    try:
        path.touch(mode=0o600)
        connection = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, timeout=0.2, cached_statements=_STATEMENTS
        )
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
    """Convert an error of SQLite to one with a hint."""
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return Failed("the disk that holds the state is full", f"free some space below {path.parent}")
    if code == sqlite3.SQLITE_BUSY:
        return Conflict(f"{path} is in use by another process", "stop the other daemon first")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return Unavailable(f"{path} is not a database", "restore it, or move it away to start without state")
    return Failed(f"cannot store state in {path}: {error}", "check the disk that holds it")
