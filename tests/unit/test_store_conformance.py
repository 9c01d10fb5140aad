"""Tests of the store's protocol: a new implementation is a new line in FACTORIES."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from insula.model.errors import Conflict, Invalid, NotFound
from insula.store.protocol import Compare, Delete, Entry, Event, Put, Store, TransactionConflict
from insula.store.sqlite import SqliteStore
from tests.support.wait import patiently

Scenario = Callable[[Store], Awaitable[None]]
FACTORIES: dict[str, Callable[[Path], Store]] = {"sqlite": lambda path: SqliteStore(path / "state.db")}


@pytest.fixture(params=FACTORIES)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Scenario], None]:
    """Runs a coroutine function on a store that is empty the first time."""

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            store = FACTORIES[request.param](tmp_path)
            try:
                await asyncio.wait_for(scenario(store), patiently(20))
            finally:
                await store.close()

        asyncio.run(main())

    return run


async def take(events: AsyncIterator[Event], count: int) -> list[Event]:
    return [await asyncio.wait_for(anext(events), patiently(5)) for _ in range(count)]


async def values(store: Store, prefix: str = "/") -> dict[str, bytes]:
    return {entry.key: entry.value for entry in (await store.list(prefix)).entries}


Run = Callable[[Scenario], None]


def test_an_entry_has_the_revisions_of_its_last_change_and_creation(run: Run) -> None:
    async def scenario(store: Store) -> None:
        assert await store.get("/a") is None
        first = await store.put("/a", b"1")
        second = await store.put("/a", b"2")
        assert second == first + 1
        assert await store.get("/a") == Entry("/a", b"2", second, first)
        third = await store.delete("/a")
        assert (await store.get("/a"), third) == (None, second + 1)
        fourth = await store.put("/a", b"")
        assert await store.get("/a") == Entry("/a", b"", fourth, fourth)

    run(scenario)


def test_list_is_a_picture_in_key_order(run: Run) -> None:
    async def scenario(store: Store) -> None:
        for key in ("/b", "/a/~", "/a/1", "/a", "/a/10", "/a-"):
            last = await store.put(key, key.encode())
        snapshot = await store.list("/a/")
        assert [entry.key for entry in snapshot.entries] == ["/a/1", "/a/10", "/a/~"]
        assert snapshot.revision == last
        assert len((await store.list("/")).entries) == 6

    run(scenario)


def test_a_write_that_saw_an_older_revision_is_refused(run: Run) -> None:
    async def scenario(store: Store) -> None:
        first = await store.put("/a", b"1", expect=0)
        with pytest.raises(TransactionConflict):
            await store.put("/a", b"2", expect=0)
        await store.put("/a", b"3", expect=first)
        with pytest.raises(Conflict):
            await store.put("/a", b"4", expect=first)
        with pytest.raises(TransactionConflict):
            await store.delete("/a", expect=first)
        assert await values(store) == {"/a": b"3"}

    run(scenario)


def test_a_transaction_is_all_or_nothing_and_names_the_first_conflict(run: Run) -> None:
    async def scenario(store: Store) -> None:
        await store.put("/taken", b"")
        before = await store.list("/")
        with pytest.raises(TransactionConflict) as conflict:
            await store.transact(
                [Compare("/free", 0), Compare("/taken", 0), Compare("/other", 9)],
                [Put("/free", b"x"), Delete("/taken")],
            )
        assert conflict.value.key == "/taken"
        assert await store.list("/") == before
        revision = await store.transact(
            [Compare("/free", 0)], [Put("/free", b"x"), Delete("/taken"), Put("/more", b"")]
        )
        assert await values(store) == {"/free": b"x", "/more": b""}
        assert {entry.revision for entry in (await store.list("/")).entries} == {revision} == {before.revision + 1}

    run(scenario)


def test_a_transaction_that_changes_nothing_has_no_revision(run: Run) -> None:
    async def scenario(store: Store) -> None:
        revision = await store.put("/a", b"")
        assert await store.delete("/nothing") == revision
        assert await store.transact([Compare("/a", revision)], []) == revision

    run(scenario)


@pytest.mark.parametrize("key", ["", "a", "/a b", "/ä", "/a\n", "/a\0", "/" + "x" * 1024])
def test_bad_keys_are_refused(run: Run, key: str) -> None:
    async def scenario(store: Store) -> None:
        for attempt in (store.get(key), store.put(key, b""), store.list(key), store.delete(key)):
            with pytest.raises(Invalid):
                await attempt
        assert await values(store) == {}

    run(scenario)


def test_bad_transactions_are_refused(run: Run) -> None:
    async def scenario(store: Store) -> None:
        with pytest.raises(Invalid, match="twice"):
            await store.transact([], [Put("/a", b"1"), Delete("/a")])
        with pytest.raises(Invalid, match="exceeds"):
            await store.put("/a", bytes((1 << 20) + 1))
        await store.put("/a", bytes(1 << 20))

    run(scenario)


def test_one_of_many_racing_creators_wins(run: Run) -> None:
    async def scenario(store: Store) -> None:
        outcomes = await asyncio.gather(
            *(store.put("/name", str(i).encode(), expect=0) for i in range(50)), return_exceptions=True
        )
        winners = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, int)]
        assert len(winners) == 1
        assert sum(isinstance(outcome, TransactionConflict) for outcome in outcomes) == 49
        assert await values(store) == {"/name": str(winners[0]).encode()}

    run(scenario)


def test_counters_survive_racing_increments(run: Run) -> None:
    async def increment(store: Store) -> None:
        while True:
            entry = await store.get("/n")
            try:
                await store.put(
                    "/n", b"%d" % (int(entry.value) + 1 if entry else 1), expect=entry.revision if entry else 0
                )
                return
            except TransactionConflict:
                continue

    async def scenario(store: Store) -> None:
        await asyncio.gather(*(increment(store) for _ in range(20)))
        assert await values(store) == {"/n": b"20"}

    run(scenario)


def test_watch_tells_history_and_future_in_order(run: Run) -> None:
    async def scenario(store: Store) -> None:
        start = await store.put("/w/a", b"0")
        first = await store.put("/w/a", b"1")
        await store.put("/other", b"")
        await store.transact([], [Delete("/w/a"), Put("/w/b", b"2")])
        events = store.watch("/w/", start)
        old = await take(events, 3)
        pending = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.05)
        assert not pending.done()
        last = await store.put("/w/c", b"3")
        new = await asyncio.wait_for(pending, patiently(5))
        assert [(e.kind, e.entry.key, e.entry.value, e.revision) for e in [*old, new]] == [
            ("put", "/w/a", b"1", first),
            ("delete", "/w/a", b"", first + 2),
            ("put", "/w/b", b"2", first + 2),
            ("put", "/w/c", b"3", last),
        ]
        assert old[0].previous == Entry("/w/a", b"0", start, start)
        assert old[1].previous == Entry("/w/a", b"1", first, start)
        assert old[2].previous is None

    run(scenario)


def test_watches_lose_nothing_under_load(run: Run) -> None:
    async def scenario(store: Store) -> None:
        async def collect(prefix: str) -> list[Event]:
            return await take(store.watch(prefix, 0), 300)

        early = [asyncio.ensure_future(collect("/x/")) for _ in range(3)]
        await asyncio.gather(*(store.put(f"/{'xy'[i % 2]}/{i % 7}", b"%d" % i) for i in range(600)))
        seen = [*await asyncio.gather(*early), await collect("/x/")]
        revisions = [event.revision for event in seen[0]]
        assert revisions == sorted(set(revisions))
        assert all(events == seen[0] for events in seen)
        state: dict[str, bytes] = {event.entry.key: event.entry.value for event in seen[0]}
        assert state == await values(store, "/x/")

    run(scenario)


def test_closing_ends_watches(run: Run) -> None:
    async def scenario(store: Store) -> None:
        async def count() -> int:
            return len([event async for event in store.watch("/", 0)])

        watcher = asyncio.ensure_future(count())
        await store.put("/a", b"")
        await asyncio.sleep(0.05)
        await store.close()
        assert await asyncio.wait_for(watcher, patiently(5)) == 1

    run(scenario)


def test_a_lease_takes_its_keys_with_it(run: Run) -> None:
    async def scenario(store: Store) -> None:
        lease = await store.grant(1.5)
        start = await store.put("/host/1", b"", lease=lease)
        await store.put("/host/2", b"", lease=lease)
        await store.put("/host/2", b"kept")  # a put without the lease takes the key out of it
        for _ in range(5):  # longer than it lasts by itself
            await asyncio.sleep(0.4)
            await store.keep_alive(lease)
        assert set(await values(store)) == {"/host/1", "/host/2"}
        events = await take(store.watch("/host/", start), 3)
        assert [(event.kind, event.entry.key) for event in events][-1] == ("delete", "/host/1")
        assert await values(store) == {"/host/2": b"kept"}
        with pytest.raises(NotFound):
            await store.keep_alive(lease)
        with pytest.raises(NotFound):
            await store.put("/late", b"", lease=lease)

    run(scenario)


def test_revoke_ends_a_lease_at_once(run: Run) -> None:
    async def scenario(store: Store) -> None:
        one, two = await store.grant(60), await store.grant(60)
        await store.put("/1", b"", lease=one)
        await store.put("/2", b"", lease=two)
        await store.revoke(one)
        await store.revoke(one)
        assert set(await values(store)) == {"/2"}
        with pytest.raises(Invalid):
            await store.grant(0)

    run(scenario)


def test_everything_is_there_after_reopening(run: Run) -> None:
    found: list[object] = []

    async def write(store: Store) -> None:
        lease = await store.grant(0.4)
        await store.put("/leased", b"", lease=lease)
        await store.put("/a", b"1")
        await store.put("/a", b"2")
        found.append(await store.list("/"))

    async def read(store: Store) -> None:
        assert await store.list("/") == found[0]
        assert [event.entry.value for event in await take(store.watch("/a", 0), 2)] == [b"1", b"2"]
        await take(store.watch("/leased", (await store.list("/")).revision), 1)  # its lease goes on
        assert set(await values(store)) == {"/a"}

    run(write)
    run(read)
