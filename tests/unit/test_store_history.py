"""The size of the store's history: bounded in revisions and bytes, in the file and in memory."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import Awaitable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.store import sqlite
from insula.store.protocol import Compacted, Event, Put
from insula.store.sqlite import SqliteStore
from insula.store.tables import ROW
from tests.support.wait import patiently

HISTORY, BYTES = 200, 64 << 10


def kept(path: Path) -> tuple[int, int, int]:
    """Revisions and bytes in the file, and the last one that was forgotten."""
    connection = sqlite3.connect(path)
    try:
        sizes = "count(DISTINCT revision), sum(length(value) + coalesce(length(previous_value), 0))"
        (revisions, size), (compacted,) = (
            connection.execute(f"SELECT {sizes} FROM changes").fetchone(),
            connection.execute("SELECT compacted FROM counters").fetchone(),
        )
        return revisions, size or 0, compacted
    finally:
        connection.close()


async def bounded(work: Awaitable[None]) -> None:
    await asyncio.wait_for(work, patiently(60))


async def history(store: SqliteStore, after: int, until: int) -> list[Event]:
    found: list[Event] = []
    async for event in store.watch("/", after):
        found.append(event)
        if event.revision == until:
            break
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6000) | st.integers(0, 20), min_size=1, max_size=8), min_size=1, max_size=400),
    st.integers(0, 400),
)
def test_it_keeps_no_more_than_both_bounds_and_nearly_as_much(sizes: list[list[int]], reopened: int) -> None:
    """Each list is a transaction: a value of so many bytes for each of some keys."""

    async def main(path: Path) -> None:
        store = SqliteStore(path, history=HISTORY, history_bytes=BYTES)
        costs = []
        before: dict[str, int] = {}
        for number, values in enumerate(sizes):
            if number == reopened:
                await store.close()
                store = SqliteStore(path, history=HISTORY, history_bytes=BYTES)
            writes = {f"/{key}": size for key, size in enumerate(values)}
            revision = await store.transact([], [Put(key, b"x" * size) for key, size in writes.items()])
            assert revision == number + 1
            costs.append(sum(ROW + size + before.get(key, 0) for key, size in writes.items()))
            before |= writes
        seen = await history(store, store._tables.compacted, len(sizes)) if store._tables.compacted < len(sizes) else []
        assert sorted({event.revision for event in seen}) == list(range(store._tables.compacted + 1, len(sizes) + 1))
        if store._tables.compacted:
            with pytest.raises(Compacted):
                await history(store, store._tables.compacted - 1, len(sizes))
        await store.close()
        revisions, size, compacted = kept(path)
        assert revisions == len(sizes) - compacted, "nothing between is missing"
        assert size <= BYTES
        assert revisions <= HISTORY + HISTORY // 64
        piece = max(BYTES // 64 + max(costs), 2 * max(costs))
        full = revisions >= HISTORY or sum(costs[compacted:]) + piece + BYTES // 16 + 2 * costs[-1] > BYTES
        assert full or compacted == 0, "what there is room for is kept"

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(bounded(main(Path(directory) / "state.db")))


def test_large_values_do_not_make_a_large_file(tmp_path: Path) -> None:
    """It was twice the size of the object for each change, twenty thousand times."""

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db", history_bytes=1 << 20)
        for number in range(60):
            await store.put("/large", bytes([number]) * (100 << 10))
        await store.close()
        assert (tmp_path / "state.db").stat().st_size < 3 << 20
        assert 0 < kept(tmp_path / "state.db")[1] <= 1 << 20

    asyncio.run(bounded(main()))


def test_a_file_with_far_too_much_is_brought_down_little_by_little(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "state.db"
        store = SqliteStore(path)
        for number in range(100):
            await store.put("/a", b"%d" % number * 2000)
        await store.close()
        much = kept(path)[1]
        store = SqliteStore(path, history_bytes=BYTES)
        sizes = []
        for _ in range(200):
            await store.put("/b", b"")
            sizes.append(sum(piece.size for piece in store._tables._pieces))
        await store.close()
        assert much > 4 * BYTES
        assert sizes[0] > 2 * BYTES, "not all at once"
        assert sizes == sorted(sizes, reverse=True) or sizes[-1] <= BYTES
        assert sizes[-1] <= BYTES
        assert kept(path)[1] <= BYTES

    asyncio.run(bounded(main()))


def test_a_reader_of_much_history_gets_it_in_parts_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite._Watcher, "BYTES", 20_000)
    asked: list[int] = []

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        for number in range(50):
            await store.transact([], [Put(f"/{key}", b"%d" % number * 1000) for key in range(3)])
        changes = store._tables.changes

        def counted(prefix: str, after: int, most: int) -> tuple[list[Event], bool]:
            asked.append(after)
            return changes(prefix, after, most)

        monkeypatch.setattr(store._tables, "changes", counted)
        events = store.watch("/", 0)
        found = [await anext(events) for _ in range(150)]
        assert [event.revision for event in found] == [number for number in range(1, 51) for _ in range(3)]
        assert len(asked) > 5 and sorted(asked) == asked
        await store.close()

    asyncio.run(bounded(main()))


def test_large_events_that_nobody_reads_do_not_wait_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite._Watcher, "BYTES", 20_000)

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        await store.put("/a", b"")
        events = store.watch("/", 0)
        assert (await anext(events)).revision == 1
        [watcher] = store._watchers
        largest = 0
        for number in range(100):
            await store.put("/a", b"%d" % number * 1000)
            largest = max(largest, sum(len(event.entry.value) for event in watcher.pending))
        assert 0 < largest <= 20_000
        assert [(await anext(events)).revision for _ in range(100)] == list(range(2, 102)), "and none is lost"
        await events.aclose()  # type: ignore[attr-defined]
        await store.close()

    asyncio.run(bounded(main()))


def test_large_entries_are_not_all_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "RECENT_BYTES", 10_000)

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        for number in range(50):
            await store.put(f"/{number}", b"x" * 1000)
        await store.put("/49", b"y" * 500)
        await store.delete("/48")
        assert sum(len(entry.value) for entry in store._recent.entries.values()) == store._recent.size <= 10_000
        assert len(store._recent.entries) >= 8, "the control"
        for number in range(48):
            entry = await store.get(f"/{number}")
            assert entry and entry.value == b"x" * 1000
        assert sum(len(entry.value) for entry in store._recent.entries.values()) == store._recent.size <= 10_000
        await store.close()

    asyncio.run(bounded(main()))
