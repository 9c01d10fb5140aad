"""A tenant's totals at past hours: what is stored, found, and deleted."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.control.accounting import history
from insula.control.accounting.history import DAYS, HOUR, append, before
from insula.control.keys import HISTORIES, REMOVED
from insula.model.accounting import UsageSnapshot, UsedTotals
from insula.model.objects import Tenant
from insula.store.protocol import Store
from insula.store.sqlite import SqliteStore

START = 1_767_225_600.0  # 2026-01-01T00:00:00Z
DAY = 24 * HOUR


def stored(path: Path, body: Callable[[Store], Awaitable[None]]) -> None:
    async def whole() -> None:
        store = SqliteStore(path / "state.db")
        try:
            await body(store)
        finally:
            await store.close()

    asyncio.run(whole())


def snapshot(at: float, cpu: int = 0) -> UsageSnapshot:
    return UsageSnapshot(at=at, used=UsedTotals(cpu=cpu))


async def fill(store: Store, times: Sequence[float], tenant: str = "acme") -> None:
    for number, at in enumerate(times):
        await append(store, tenant, snapshot(at, number))


def test_the_last_snapshot_that_is_not_later_is_found(tmp_path: Path) -> None:
    """Also in an earlier day, month or year, and none of another tenant."""

    async def body(store: Store) -> None:
        await fill(store, [START - 40 * DAY, START + 60, START + HOUR + 5, START + 3 * DAY])
        await fill(store, [START + 30], "globex")
        for at, cpu in (
            (START + 3 * DAY, 3),
            (START + 3 * DAY - 1, 2),
            (START + HOUR + 5, 2),
            (START + HOUR, 1),
            (START + 59, 0),
            (START - 40 * DAY, 0),
            (START + 300 * DAY, 3),
        ):
            found = await before(store, "acme", at)
            assert found and found.used.cpu == cpu, at
        assert await before(store, "acme", START - 40 * DAY - 1) is None
        assert await before(store, "nobody", START) is None

    stored(tmp_path, body)


def test_an_hour_has_one_snapshot(tmp_path: Path) -> None:
    """However often insulad is started in it, and if the clock is set back."""

    async def body(store: Store) -> None:
        await fill(store, [START + 1, START + 10, START + HOUR - 1, START + HOUR, START + 5])
        found = await HISTORIES.get(store, "acme", "2026-01-01")
        assert found and [each.at for each in found.value.snapshots] == [START + 1, START + HOUR]

    stored(tmp_path, body)


def test_old_days_are_deleted(tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        await fill(store, [START, START + DAY, START + DAYS * DAY, START + (DAYS + 1) * DAY])
        kept = [HISTORIES.parts(entry.key)[1] for entry in (await store.list(HISTORIES.prefix("acme"))).entries]
        assert kept == ["2026-01-02", "2027-02-05", "2027-02-06"]

    stored(tmp_path, body)


def test_a_damaged_day_hides_only_itself(tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        await fill(store, [START, START + DAY])
        await store.put(HISTORIES.key("acme", "2026-01-02"), b"{")
        found = await before(store, "acme", START + 2 * DAY)
        assert found and found.at == START
        await append(store, "acme", snapshot(START + DAY + HOUR))
        assert (await before(store, "acme", START + 2 * DAY) or found).at == START + DAY + HOUR

    stored(tmp_path, body)


@given(st.lists(st.integers(0, 90 * 24), unique=True, max_size=12), st.integers(0, 95 * 24))
@settings(max_examples=15, deadline=None)
def test_it_is_what_a_list_would_find(hours: list[int], asked: int) -> None:
    times = [START + hour * HOUR for hour in sorted(hours)]
    at = START + asked * HOUR

    async def body(store: Store) -> None:
        await fill(store, times)
        found = await before(store, "acme", at)
        expected = max((each for each in times if each <= at), default=None)
        assert (found.at if found else None) == expected

    with tempfile.TemporaryDirectory() as directory:
        stored(Path(directory), body)


def test_a_day_fits_into_few_kilobytes(tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        await fill(store, [START + number * HOUR for number in range(24)])
        entry = await store.get(HISTORIES.key("acme", "2026-01-01"))
        assert entry and len(HISTORIES.decode(entry).snapshots) == 24
        assert len(entry.value) < 10_000

    stored(tmp_path, body)


def test_the_last_totals_of_removed_tenants_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST", 3)
    acme = Tenant(name="acme", index=0, id_base=0, created=START - DAY)

    async def body(store: Store) -> None:
        async def kept(at: float, cpu: int) -> list[float]:
            await store.transact([], await history.last_totals(store, acme, snapshot(at, cpu)))
            return [each.until - START for each in await REMOVED.list(store)]

        assert await kept(START, 0) == [], "it has used nothing"
        assert await kept(START, 5) == [0]
        assert await kept(START + 1, 5) == [0, 1]
        assert await kept(START + 2, 5) == [0, 1, 2]
        assert await kept(START + 3, 5) == [1, 2, 3]
        assert await kept(START + 2 + DAYS * DAY, 5) == [2, 3, 2 + DAYS * DAY]
        last = (await REMOVED.list(store))[-1]
        assert (last.tenant, last.since, last.used.cpu, last.other_cpu) == ("acme", START - DAY, 5, 0)

    stored(tmp_path, body)
