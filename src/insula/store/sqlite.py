"""The embedded store: one SQLite file and one thread, with group commit.

SQLite in WAL mode with `synchronous=FULL` returns from COMMIT when the log is on the disk. An fsync takes about as long
as the rest of a launch. So the thread commits groups: all requests that arrived during the last fsync become one SQLite
transaction. Each has a SAVEPOINT and a revision of its own, and gets its result after the common COMMIT. Reads are
served before that. A group in which no request has to be durable is not synced (`synchronous=NORMAL`): its part of the
log is synced with the next one.

The file is locked exclusively while it is open: a second daemon on the same state gets an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from insula.model.errors import Failed, InsulaError, Invalid, Unavailable
from insula.store.migrations import STEPS, Migration
from insula.store.protocol import (
    Compare,
    Delete,
    Entry,
    Event,
    Put,
    Snapshot,
    Write,
    check_key,
    check_writes,
)
from insula.store.recent import Recent
from insula.store.tables import Tables, explain, size_of

T = TypeVar("T")
GROUP = 256
"""The maximum number of requests in one commit."""
RECENT = 4096
"""The number of cached entries; the cache is valid because no other process writes."""
RECENT_BYTES = 64 << 20
"""The maximum size of the cached values together, in bytes."""


class _Operation(NamedTuple):
    work: Callable[[], Any]
    writes: bool
    durable: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class _Watcher:
    """A bounded queue of events for one reader. When it is full, the reader continues from the file (`lagging`)."""

    LIMIT = 4096
    BYTES = 16 << 20

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.loop = asyncio.get_running_loop()
        self.wake = asyncio.Event()
        self.pending: deque[Event] = deque()
        self.size = 0
        self.lagging = True

    def push(self, events: Sequence[Event]) -> None:
        if not self.lagging:
            self.pending.extend(events)
            self.size += sum(map(size_of, events))
            self.lagging = len(self.pending) > self.LIMIT or self.size > self.BYTES
            if self.lagging:
                self.take()
        self.wake.set()

    def take(self) -> Sequence[Event]:
        taken, self.pending, self.size = self.pending, deque(), 0
        return taken


class SqliteStore:
    """A `Store` in the file `path`, which is made (mode 0600) if it doesn't exist.

    `history` is the minimum number of past revisions that can be watched, unless they have more than `history_bytes`.
    Unavailable if the file has a newer version or is not a database, Conflict if another process has it open.
    """

    def __init__(
        self, path: Path, *, history: int = 10_000, history_bytes: int = 256 << 20, steps: Sequence[Migration] = STEPS
    ) -> None:
        self.path = path
        self._recent = Recent(RECENT, RECENT_BYTES)
        self._tables = Tables(path, history, history_bytes, self._recent, steps)
        self._synced = True  # whether commits wait for the disk
        self._requests: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._watchers: set[_Watcher] = set()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._unarmed = set(self._tables.deadlines)
        self._expiring: set[asyncio.Task[None]] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="insula-store", daemon=True)
        self._thread.start()

    # -- the Store protocol --------------------------------------------------------------------------------------

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        if not self._closed:
            with contextlib.suppress(KeyError):
                return self._recent[key]
        return await self._read(lambda: self._recall(key))

    async def list(self, prefix: str) -> Snapshot:
        check_key(prefix)
        return await self._read(lambda: self._tables.scan(prefix))

    async def put(self, key: str, value: bytes, *, expect: int | None = None, lease: int | None = None) -> int:
        compares = [] if expect is None else [Compare(key, expect)]
        return await self.transact(compares, [Put(key, value, lease)])

    async def delete(self, key: str, *, expect: int | None = None) -> int:
        compares = [] if expect is None else [Compare(key, expect)]
        return await self.transact(compares, [Delete(key)])

    async def transact(self, compares: Sequence[Compare], writes: Sequence[Write], *, durable: bool = True) -> int:
        for compare in compares:
            check_key(compare.key)
        check_writes(writes)
        return await self._write(lambda: self._tables.transact(compares, writes), durable=durable)

    async def flush(self) -> None:
        await self._read(self._sync)

    def _sync(self) -> None:
        log = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(log)
        except OSError as error:
            raise Failed(f"the state can't be written: {error.strerror}", "look at the disk below it") from error
        finally:
            os.close(log)

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Event]:
        check_key(prefix)
        watcher = _Watcher(prefix)
        self._watchers.add(watcher)
        seen = from_revision
        try:
            while not self._closed:
                watcher.wake.clear()
                for event in await self._next(watcher, seen):
                    yield event
                    seen = event.revision
                if not (watcher.pending or watcher.lagging or self._closed):
                    await watcher.wake.wait()
        finally:
            self._watchers.discard(watcher)

    async def _next(self, watcher: _Watcher, seen: int) -> Sequence[Event]:
        """Return the events after `seen`: from memory, or from the file for a watcher that is new or lagging."""
        if not watcher.lagging:
            return [event for event in watcher.take() if event.revision > seen]
        watcher.take()
        watcher.lagging = False  # events pushed from here on may also be in the file
        events, more = await self._read(lambda: self._tables.changes(watcher.prefix, seen, watcher.BYTES))
        watcher.lagging |= more
        return events

    async def grant(self, ttl: float) -> int:
        if not 0 < ttl <= 1e9:
            raise Invalid(f"a lease can't last {ttl} seconds", "use a positive number of seconds")
        lease = await self._write(lambda: self._tables.grant(ttl))
        self._arm(lease)
        return lease

    async def keep_alive(self, lease: int) -> None:
        await self._read(lambda: self._tables.keep_alive(lease))

    async def revoke(self, lease: int) -> None:
        await self._write(lambda: self._tables.revoke(lease))
        if timer := self._timers.pop(lease, None):
            timer.cancel()

    async def close(self) -> None:
        """Finish earlier requests, end the watches, and close the file."""
        if self._closed:
            return
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        for watcher in self._watchers:
            watcher.loop.call_soon_threadsafe(watcher.wake.set)
        self._requests.put(None)
        await asyncio.to_thread(self._thread.join)

    def _recall(self, key: str) -> Entry | None:
        entry = self._tables.get(key)
        self._recent.add(key, entry)
        return entry

    # -- leases end by timers of the event loop ------------------------------------------------------------------

    def _arm(self, lease: int) -> None:
        delay = self._tables.deadlines.get(lease, 0.0) - time.monotonic()
        self._timers[lease] = asyncio.get_running_loop().call_later(delay, self._spawn_expire, lease)

    def _spawn_expire(self, lease: int) -> None:
        task = asyncio.get_running_loop().create_task(self._expire(lease))
        self._expiring.add(task)
        task.add_done_callback(self._expiring.discard)

    async def _expire(self, lease: int) -> None:
        over = False
        try:
            over = await self._write(lambda: self._tables.expire(lease))
        except InsulaError:  # a full disk: the lease stays expired, and its keys are deleted later
            await asyncio.sleep(1.0)
        if over:
            self._timers.pop(lease, None)
        elif not self._closed:
            self._arm(lease)

    # -- the way to the thread -----------------------------------------------------------------------------------

    async def _read(self, work: Callable[[], T]) -> T:
        return await self._submit(work, writes=False)

    async def _write(self, work: Callable[[], T], *, durable: bool = True) -> T:
        return await self._submit(work, writes=True, durable=durable)

    async def _submit(self, work: Callable[[], T], *, writes: bool, durable: bool = False) -> T:
        if self._closed:
            raise Unavailable("the store is closed", "start the daemon")
        while self._unarmed:  # leases of an earlier run, now that there is an event loop
            self._arm(self._unarmed.pop())
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._requests.put(_Operation(work, writes, durable, loop, future))
        return await future

    def _work(self) -> None:
        """Run the thread: take all waiting requests, serve the reads, and commit the writes together."""
        last = False
        while not last:
            group, last = self._take()
            if trouble := self._stuck():
                for request in group:
                    _answer(request, trouble)
                continue
            for request in group:
                if not request.writes:
                    _answer(request, _attempt(request.work))
            if writes := [request for request in group if request.writes]:
                self._commit(writes)
        self._tables.connection.close()

    def _stuck(self) -> Exception | None:
        """Roll back a transaction whose rollback failed before; returns the error if it fails again, else None.

        Until it succeeds nothing is read or written, because both would be inside that transaction.
        """
        try:
            if self._tables.connection.in_transaction:
                self._tables.connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            return explain(error, self.path)
        return None

    def _take(self) -> tuple[Sequence[_Operation], bool]:
        """Return the waiting requests, at least one, and whether they are the last."""
        group: deque[_Operation] = deque()
        request = self._requests.get()
        while request is not None:
            group.append(request)
            if len(group) == GROUP:
                return group, False
            try:
                request = self._requests.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _commit(self, requests: Sequence[_Operation]) -> None:
        connection, tables = self._tables.connection, self._tables
        tables.begin()
        before = tables.mark()
        try:
            durable = any(request.durable for request in requests)
            if durable is not self._synced:
                connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._synced = durable
            connection.execute("BEGIN IMMEDIATE")
            outcomes = [self._alone(requests[0])] if len(requests) == 1 else [*map(self._savepoint, requests)]
            if tables.events:
                tables.save_counters()
            connection.execute("COMMIT")
        except Exception as error:  # this thread must survive any error
            with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back already
                connection.execute("ROLLBACK")
            tables.restore(before)
            outcomes = [_explain(error, self.path) for _ in requests]
        self._publish(tables.events)
        for request, outcome in zip(requests, outcomes, strict=True):
            _answer(request, outcome)

    def _alone(self, request: _Operation) -> Any:
        """Run the only request of a transaction; returns its result, and raises its exception."""
        outcome = _attempt(request.work)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _savepoint(self, request: _Operation) -> Any:
        """Run a request in a savepoint; returns its result, or its exception after a rollback to the savepoint."""
        connection, tables = self._tables.connection, self._tables
        before = tables.mark()
        connection.execute("SAVEPOINT request")
        outcome = _attempt(request.work)
        if isinstance(outcome, sqlite3.Error):
            raise outcome  # an error of the disk affects the whole group
        if isinstance(outcome, Exception):
            connection.execute("ROLLBACK TO request")
            tables.restore(before)
        connection.execute("RELEASE request")
        return outcome

    def _publish(self, events: Sequence[Event]) -> None:
        self._recent.apply(events)
        for watcher in self._watchers.copy():
            if of_interest := [event for event in events if event.entry.key.startswith(watcher.prefix)]:
                with contextlib.suppress(RuntimeError):  # its loop is closed
                    watcher.loop.call_soon_threadsafe(watcher.push, of_interest)


def _explain(error: Exception, path: Path) -> Exception:
    return explain(error, path) if isinstance(error, sqlite3.Error) else error


def _attempt(work: Callable[[], Any]) -> Any:
    """Call a function; returns its result or its exception: the thread must survive every request."""
    try:
        return work()
    except Exception as error:
        return error


def _answer(request: _Operation, outcome: Any) -> None:
    def deliver() -> None:
        if request.future.done():  # cancelled meanwhile
            return
        if isinstance(outcome, Exception):
            request.future.set_exception(outcome)
        else:
            request.future.set_result(outcome)

    with contextlib.suppress(RuntimeError):  # its loop is closed
        request.loop.call_soon_threadsafe(deliver)
