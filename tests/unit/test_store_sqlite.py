"""Tests of SQLite's store only: durability, the lock, migrations, group commit, pruning of the history."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from insula.model.errors import Conflict, Failed, Invalid, NotFound, Unavailable
from insula.model.objects import Limits, Tenant
from insula.store.migrations import STEPS, migrate
from insula.store.protocol import Compacted, Compare, Delete, Put, TransactionConflict, Write
from insula.store.sqlite import GROUP, RECENT, SqliteStore
from insula.store.typed import Keyspace
from tests.support.wait import patiently

WRITER = """
import asyncio, sys
from pathlib import Path
from insula.store.protocol import Put
from insula.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    async def write(worker):
        for i in range(10**9):
            await store.transact([], [Put(f"/{worker}/{i}/a", b"x" * 500), Put(f"/{worker}/{i}/b", b"")])
            sys.stdout.write(f"/{worker}/{i}\\n"); sys.stdout.flush()
    await asyncio.gather(*(write(w) for w in range(4)))

asyncio.run(main())
"""


def test_committed_writes_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    answered: set[str] = set()
    for lines in (1, 3, 7, 12, 20):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        answered.update(writer.stdout.readline().strip() for _ in range(lines))
        time.sleep(random.uniform(0.0, 0.02))
        os.kill(writer.pid, signal.SIGKILL)
        *complete, _ = writer.stdout.read().split("\n")  # the last line may be cut
        answered.update(complete)
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    keys = {key for (key,) in connection.execute("SELECT key FROM entries")}
    connection.close()
    assert len(answered) >= 20
    assert not {name for name in answered if not {f"{name}/a", f"{name}/b"} <= keys}
    assert {key[:-2] for key in keys if key.endswith("/a")} == {key[:-2] for key in keys if key.endswith("/b")}


def test_commits_wait_for_the_disk(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    pragmas = {
        name: store._tables.connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("synchronous", "journal_mode", "locking_mode")
    }
    asyncio.run(store.close())
    assert pragmas == {"synchronous": 2, "journal_mode": "wal", "locking_mode": "exclusive"}
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600


class Denying:
    """Makes SQLite refuse what is in `denied` (sqlite3_set_authorizer): BEGIN, COMMIT, ROLLBACK."""

    def __init__(self, store: SqliteStore) -> None:
        self.denied: set[str] = set()
        self.tried: list[str] = []
        store._tables.connection.set_authorizer(self._ask)

    def _ask(self, action: int, what: str | None, *_: str | None) -> int:
        if action != sqlite3.SQLITE_TRANSACTION or what is None:
            return sqlite3.SQLITE_OK
        self.tried.append(what)
        return sqlite3.SQLITE_DENY if what in self.denied else sqlite3.SQLITE_OK


@pytest.mark.parametrize("denied", [{"BEGIN"}, {"COMMIT"}, {"COMMIT", "ROLLBACK"}])
def test_a_commit_that_fails_changes_nothing(tmp_path: Path, denied: set[str]) -> None:
    """Also if it can't be rolled back: what was not committed is never seen, and the store works again after that."""

    async def body() -> None:
        store = SqliteStore(tmp_path / "state.db")
        await store.put("/a", b"before")
        revision = (await store.list("/")).revision
        events = store.watch("/", revision)
        denying = Denying(store)
        denying.denied = denied
        for _ in range(2):
            with pytest.raises(Failed, match="cannot store state"):
                await store.transact([], [Put("/a", b"never"), Put("/b", b"never")])
        assert denied <= set(denying.tried), "the positive control: each was refused"
        if "ROLLBACK" in denied:
            with pytest.raises(Failed, match="cannot store state"):
                await store.list("/")
        denying.denied = set()
        assert [(e.key, e.value) for e in (await store.list("/")).entries] == [("/a", b"before")]
        assert (await store.list("/")).revision == revision
        entry = await store.get("/a")
        assert entry is not None and entry.value == b"before"
        assert await store.get("/b") is None
        assert await store.put("/c", b"after") == revision + 1
        first = await anext(events)
        assert (first.entry.key, first.revision) == ("/c", revision + 1)
        await events.aclose()  # type: ignore[attr-defined]
        await store.close()

    asyncio.run(body())
    again = SqliteStore(tmp_path / "state.db")

    async def look() -> list[str]:
        keys = [entry.key for entry in (await again.list("/")).entries]
        await again.close()
        return keys

    assert asyncio.run(look()) == ["/a", "/c"]


def test_the_thread_outlives_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets the error, nothing has changed, and the next request is served."""

    async def body() -> None:
        store = SqliteStore(tmp_path / "state.db")

        def broken() -> None:
            raise ZeroDivisionError("injected")

        with monkeypatch.context() as patch:
            patch.setattr(store._tables, "save_counters", broken)
            with pytest.raises(ZeroDivisionError, match="injected"):
                await store.put("/a", b"never")
        assert await store.get("/a") is None
        assert await store.put("/a", b"after") == 1
        await store.close()

    asyncio.run(body())


def test_a_second_owner_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    with pytest.raises(Conflict, match="in use by another process"):
        SqliteStore(path)
    asyncio.run(store.close())
    asyncio.run(SqliteStore(path).close())


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"this is no database\n" * 100)
    with pytest.raises(Unavailable, match="is not a database"):
        SqliteStore(path)
    assert path.read_bytes() == b"this is no database\n" * 100
    with pytest.raises(Failed, match="cannot store state"):
        SqliteStore(tmp_path / "missing" / "state.db")


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    asyncio.run(SqliteStore(path).close())
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
    connection.close()
    with pytest.raises(Unavailable, match=f"schema version {len(STEPS) + 1}"):
        SqliteStore(path)


def test_migrations_go_forward_and_only_whole() -> None:
    def second(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE entries ADD COLUMN note TEXT")

    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE more (x)")
        raise RuntimeError("in the middle")

    connection = sqlite3.connect(":memory:", isolation_level=None)
    assert migrate(connection) == 0
    assert migrate(connection) == len(STEPS)
    with pytest.raises(RuntimeError):
        migrate(connection, [*STEPS, second, broken])
    assert connection.execute("PRAGMA user_version").fetchone() == (len(STEPS),)
    assert not connection.execute("SELECT * FROM sqlite_schema WHERE name = 'more'").fetchall()
    assert "note" not in {row[1] for row in connection.execute("PRAGMA table_info(entries)")}
    assert migrate(connection, [*STEPS, second]) == len(STEPS)
    assert "note" in {row[1] for row in connection.execute("PRAGMA table_info(entries)")}


def test_a_full_disk_is_one_clear_error_and_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        await store.put("/a", b"1")
        pages = store._tables.connection.execute("PRAGMA page_count").fetchone()[0]
        store._tables.connection.execute(f"PRAGMA max_page_count = {pages}")
        before = await store.list("/")
        with pytest.raises(Failed, match="disk that holds the state is full") as error:
            await store.transact([], [Put("/b", bytes(100_000)), Put("/a", b"2")])
        assert error.value.hint
        assert await store.list("/") == before
        store._tables.connection.execute("PRAGMA max_page_count = 100000")
        assert await store.put("/b", bytes(100_000)) == before.revision + 1
        await store.close()

    asyncio.run(main())


def test_writers_share_commits_and_fail_alone(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        statements: list[str] = []
        store._tables.connection.set_trace_callback(statements.append)
        outcomes = await asyncio.gather(
            *(store.put(f"/{i}", b"", expect=i % 2 and 99) for i in range(100)), return_exceptions=True
        )
        assert [isinstance(outcome, int) for outcome in outcomes] == [i % 2 == 0 for i in range(100)]
        assert sorted(o for o in outcomes if isinstance(o, int)) == list(range(1, 51))
        assert 1 <= statements.count("COMMIT") < 50
        assert len((await store.list("/")).entries) == 50
        await store.close()

    asyncio.run(main())


def test_many_writers_take_several_commits_in_the_order_in_which_they_asked(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        held = threading.Event()
        waiting = asyncio.ensure_future(store._read(held.wait))  # so that all that follow wait together
        writes = [asyncio.ensure_future(store.put(f"/{i}", b"")) for i in range(2 * GROUP)]
        await asyncio.sleep(0)
        statements: list[str] = []
        store._tables.connection.set_trace_callback(statements.append)
        held.set()
        assert await waiting
        assert await asyncio.gather(*writes) == list(range(1, 2 * GROUP + 1))
        await store.list("/")
        assert statements.count("COMMIT") == statements.count("BEGIN IMMEDIATE")
        assert 2 <= statements.count("COMMIT") <= 3, "one, had they no bound; the first read may have taken some along"
        await store.close()
        await store.close()  # changes nothing

    asyncio.run(main())


def test_reads_do_not_wait_for_the_writes_beside_them(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        held, order = threading.Event(), list[str]()
        waiting = asyncio.ensure_future(store._read(held.wait))
        write = asyncio.ensure_future(store.put("/a", b""))
        read = asyncio.ensure_future(store.list("/"))
        for task, name in ((write, "write"), (read, "read")):
            task.add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
        await asyncio.sleep(0)
        held.set()
        await asyncio.gather(waiting, write, read)
        await asyncio.sleep(0)
        assert order == ["read", "write"] and read.result().entries == []
        await store.close()

    asyncio.run(main())


def test_the_cache_equals_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("insula.store.sqlite.RECENT", 3)

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        keys = [f"/{i}" for i in range(6)]
        for round_ in range(3):
            for key in keys:
                await store.put(key, b"%d" % round_)
                assert len(store._recent.entries) <= 3
            for key in keys:
                entry, again = await store.get(key), await store.get(key)
                assert entry is not None and entry.value == b"%d" % round_ and entry == again
        assert set(store._recent.entries) == set(keys[-3:]), "those that were asked for last"
        statements: list[str] = []
        store._tables.connection.set_trace_callback(statements.append)
        assert await store.get("/5") and not statements, "the positive control: without the file"
        assert await store.get("/0") and statements
        await store.delete("/0")
        assert await store.get("/0") is None
        await store.close()
        with pytest.raises(Unavailable, match="closed"):
            await store.get("/5")

    asyncio.run(main())


def test_the_times_that_a_lease_may_last(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        for ttl in (0.0, -1.0, float("nan"), float("inf"), 1e9 + 1):
            with pytest.raises(Invalid, match="can't last"):
                await store.grant(ttl)
        lease = await store.grant(1e9)
        await store.put("/a", b"", lease=lease)
        assert list(store._timers) == [lease] and not store._timers[lease].cancelled()
        timer = store._timers[lease]
        await store.revoke(lease)
        assert timer.cancelled() and not store._timers and await store.get("/a") is None
        last = await store.grant(1e9)
        timer = store._timers[last]
        await store.close()
        assert timer.cancelled(), "or the event loop would wake up for a store that is closed"

    asyncio.run(main())


def test_a_lease_whose_end_can_not_be_written_ends_later(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        lease = await store.grant(1e6)
        await store.put("/a", b"", lease=lease)
        events = store.watch("/", 1)
        denying = Denying(store)
        denying.denied = {"COMMIT"}
        store._tables.deadlines[lease] = 0.0
        store._spawn_expire(lease)  # as its timer would
        while "ROLLBACK" not in denying.tried:
            await asyncio.sleep(0.01)
        entry = await store.get("/a")
        assert entry is not None, "what could not be written has not happened"
        denying.denied = set()
        event = await asyncio.wait_for(anext(events), patiently(20))
        assert (event.kind, event.entry.key) == ("delete", "/a")
        await events.aclose()  # type: ignore[attr-defined]
        while store._expiring:  # what has ended is not remembered
            await asyncio.sleep(0.01)
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("beside", [0, 3])
def test_a_request_that_fails_in_the_middle_leaves_nothing(tmp_path: Path, beside: int) -> None:
    """Alone, and in a commit that it shares with others: theirs is kept, in the file, in memory and for watchers."""

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        await store.put("/old", b"before")
        events = store.watch("/", 1)
        failing: list[Write] = [Put("/half", b""), Delete("/old"), Put("/late", b"", 999)]  # no lease has this number
        held = threading.Event()
        waiting = asyncio.ensure_future(store._read(held.wait))  # so that all that follow wait together
        tasks = [
            *(asyncio.ensure_future(store.put(f"/{i}", b"")) for i in range(beside)),
            asyncio.ensure_future(store.transact([], failing)),
            *(asyncio.ensure_future(store.put(f"/{i}", b"")) for i in range(beside, 2 * beside)),
        ]
        await asyncio.sleep(0)
        held.set()
        await waiting
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes.pop(beside), NotFound)
        assert outcomes == list(range(2, 2 * beside + 2)), "their revisions have no gap"
        others = {f"/{i}" for i in range(2 * beside)}
        assert {entry.key for entry in (await store.list("/")).entries} == {"/old", *others}
        old = await store.get("/old")
        assert old is not None and old.value == b"before" and await store.get("/half") is None
        await store.put("/last", b"")
        seen = [(await anext(events)).entry.key for _ in range(2 * beside + 1)]
        assert {*seen} == {*others, "/last"}
        await events.aclose()  # type: ignore[attr-defined]
        await store.close()

    asyncio.run(main())
    asyncio.run(reopened(tmp_path / "state.db", 2 * beside + 2))


async def reopened(path: Path, count: int) -> None:
    store = SqliteStore(path)
    assert len((await store.list("/")).entries) == count
    await store.close()


def test_old_history_is_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db", history=20)
        for i in range(100):
            await store.put("/a", b"%d" % i)
        with pytest.raises(Compacted):
            await anext(store.watch("/", 1))
        event = await anext(store.watch("/", 80))
        assert (event.revision, event.entry.value) == (81, b"80")
        await store.close()
        connection = sqlite3.connect(tmp_path / "state.db")
        assert connection.execute("SELECT count(*) FROM changes").fetchone()[0] <= 40
        connection.close()

    asyncio.run(main())


def test_a_slow_watcher_reads_on_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("insula.store.sqlite._Watcher.LIMIT", 10)

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        await store.put("/0", b"")
        events = store.watch("/", 0)
        assert (await anext(events)).revision == 1
        await asyncio.gather(*(store.put(f"/{i}", b"") for i in range(1, 200)))
        assert [(await anext(events)).revision for _ in range(199)] == list(range(2, 201))
        await store.close()

    asyncio.run(main())


def test_a_cancelled_request_harms_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        task = asyncio.ensure_future(store.put("/a", b""))
        await asyncio.sleep(0)
        task.cancel()
        await store.put("/b", b"")
        assert "/b" in {entry.key for entry in (await store.list("/")).entries}
        await store.close()
        with pytest.raises(Unavailable):
            await store.get("/a")

    asyncio.run(main())


def test_typed_objects_come_back_as_they_were(tmp_path: Path) -> None:
    tenants = Keyspace("/tenants", Tenant, 1)
    images = Keyspace("/images", Limits, 2)
    acme = Tenant(name="acme", index=1, id_base=1 << 30, limits=Limits(cpus=1.5), labels={"a": "ü"}, created=1.0)

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        await store.transact([tenants.absent("acme")], [tenants.put(acme, "acme")])
        found = await tenants.get(store, "acme")
        assert found is not None
        assert found.value == acme
        await store.transact([tenants.unchanged(found, "acme")], [images.put(Limits(), "_", "library/x:1")])
        assert images.parts((await store.list(images.prefix("_"))).entries[0].key) == ("_", "library/x:1")
        assert await tenants.list(store) == [acme]
        await store.put("/tenants/bad", b'{"name": 3}')
        with pytest.raises(Failed, match="/tenants/bad is damaged"):
            await tenants.get(store, "bad")
        for parts in ((), ("",), ("a", "b"), ("a/b", "c", "d")):
            with pytest.raises(ValueError, match="is not a key"):
                tenants.key(*parts)
        with pytest.raises(ValueError, match="is not a key"):
            images.key("a/b", "c")
        with pytest.raises(Invalid):
            await tenants.get(store, "a b")
        await store.close()

    asyncio.run(main())


def test_a_key_that_was_not_there_is_found_once_it_is(tmp_path: Path) -> None:
    """That it is not there is remembered, until it is; of so many keys and no more."""

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        for value in (b"1", b"2"):
            assert [await store.get("/a") for _ in range(2)] == [None, None]
            with pytest.raises(TransactionConflict):
                await store.transact([Compare("/a", 99)], [Put("/a", b"0")])
            assert await store.get("/a") is None
            await store.put("/a", value)
            found = await store.get("/a")
            assert found and found.value == value
            await store.delete("/a")
        for number in range(RECENT + 5):
            assert await store.get(f"/b/{number}") is None
        assert len(store._recent.absent) == RECENT
        await store.close()

    asyncio.run(main())
