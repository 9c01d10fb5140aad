"""Streams of events: several joined into one, and entries of the audit log as they are recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from insula.api import audit
from insula.api.streams import merged
from insula.audit.reader import timestamp
from insula.audit.writer import AuditLog
from insula.model.errors import Failed

ended: list[str] = []


async def source(name: str, queue: asyncio.Queue[object]) -> AsyncIterator[object]:
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        ended.append(name)


@pytest.fixture(autouse=True)
def forget() -> None:
    ended.clear()


def test_items_come_as_they_are_there() -> None:
    async def main() -> None:
        one, two = asyncio.Queue[object](), asyncio.Queue[object]()
        items = merged(source("one", one), source("two", two))
        for queue, item in ((one, 1), (two, 2), (two, 3), (one, 4)):
            queue.put_nowait(item)
            assert await anext(items) == item
        for number in range(10, 20):
            one.put_nowait(number)
            two.put_nowait(-number)
        found = [await anext(items) for _ in range(20)]
        assert [item for item in found if item > 0] == list(range(10, 20))  # type: ignore[operator]
        assert [item for item in found if item < 0] == list(range(-10, -20, -1))  # type: ignore[operator]
        one.put_nowait(None)
        with pytest.raises(StopAsyncIteration):
            await anext(items)
        assert sorted(ended) == ["one", "two"]

    asyncio.run(main())


def test_the_failure_of_one_is_raised_and_ends_the_others() -> None:
    async def main() -> None:
        one, two = asyncio.Queue[object](), asyncio.Queue[object]()
        items = merged(source("one", one), source("two", two))
        two.put_nowait(Failed("broken", "mend it"))
        with pytest.raises(Failed, match="broken"):
            await anext(items)
        assert sorted(ended) == ["one", "two"]

    asyncio.run(main())


def test_cancelling_ends_all() -> None:
    async def main() -> None:
        items = merged(source("one", asyncio.Queue()), source("two", asyncio.Queue()))
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert sorted(ended) == ["one", "two"]

    asyncio.run(main())


def entry(number: int) -> dict[str, object]:
    return {"time": timestamp(float(number)), "verb": "POST /x", "name": str(number)}


def test_entries_are_events(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log")

    async def main() -> None:
        watching = audit.watch(log)
        first = asyncio.ensure_future(anext(watching))
        while not log.watchers:
            await asyncio.sleep(0)
        log.record(entry(7))
        story = await first
        assert (story["time"], story["kind"], story["action"], story["name"]) == (7.0, "request", "POST /x", "7")
        await watching.aclose()  # type: ignore[attr-defined]
        assert not log.watchers

    try:
        asyncio.run(main())
    finally:
        log.close()


def test_a_client_that_does_not_read_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_MOST_WAITING", 5)
    log = AuditLog(tmp_path / "log")

    async def main() -> None:
        watching = audit.watch(log)
        first = asyncio.ensure_future(anext(watching))
        while not log.watchers:
            await asyncio.sleep(0)
        for number in range(100):
            log.record(entry(number))
        assert not log.watchers
        assert [(await first)["name"], *[(await anext(watching))["name"] for _ in range(4)]] == list("01234")
        with pytest.raises(Failed):
            await anext(watching)

    try:
        asyncio.run(main())
    finally:
        log.close()
