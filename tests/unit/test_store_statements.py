"""Transactions of the SQLite store: statements of many rows, and entries that are known without reading the file."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from insula.store.protocol import Delete, Put
from insula.store.sqlite import SqliteStore


def test_writers_of_one_commit_see_what_those_before_them_have_changed(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        await store.put("/old", b"1")
        statements: list[str] = []
        store._tables.connection.set_trace_callback(statements.append)
        held = threading.Event()
        waiting = asyncio.ensure_future(store._read(held.wait))
        writes = [
            store.put("/new", b"", expect=0),
            store.put("/new", b"", expect=0),
            store.delete("/old", expect=1),
            store.put("/old", b"", expect=1),
            store.put("/old", b"2", expect=0),
            store.put("/new", b"3", expect=2),
            store.delete("/new", expect=2),
        ]
        tasks = [asyncio.ensure_future(write) for write in writes]
        await asyncio.sleep(0)
        held.set()
        await waiting
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert statements.count("COMMIT") == 1, "the control: all in one"
        assert [each if isinstance(each, int) else None for each in outcomes] == [2, None, 3, None, 4, 5, None]
        assert [(e.key, e.value) for e in (await store.list("/")).entries] == [("/new", b"3"), ("/old", b"2")]
        await store.close()

    asyncio.run(main())


def test_a_transaction_of_many_writes_is_whole(tmp_path: Path) -> None:
    """Statements have some rows each; here are more, and numbers that are no multiple."""

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        keys = [f"/{number:03}" for number in range(103)]
        await store.transact([], [Put(key, key.encode()) for key in keys])
        await store.transact([], [*(Delete(key) for key in keys[:51]), *(Put(key, b"2") for key in keys[51:])])
        expected = [(key, b"2", 2, 1) for key in keys[51:]]
        assert [(e.key, e.value, e.revision, e.created) for e in (await store.list("/")).entries] == expected
        events = store.watch("/", 0)
        seen = [await anext(events) for _ in range(206)]
        assert [event.revision for event in seen] == [1] * 103 + [2] * 103
        assert sorted(e.entry.key for e in seen if e.kind == "delete") == keys[:51]
        await events.aclose()  # type: ignore[attr-defined]
        await store.close()

    asyncio.run(main())
