"""The records of idempotency keys in a real store: bounds, ends, and what is kept of an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from insula.control import carried, idempotency
from insula.control.carried import CarryingStore
from insula.control.idempotency import MAX_ANSWER, Attempt, IdempotencyKeys
from insula.control.keys import IDEMPOTENCY
from insula.model.errors import Conflict, IdempotencyKeyReused, TooManyRequests
from insula.store.protocol import Compare, Put, TransactionConflict
from insula.store.sqlite import SqliteStore
from insula.store.typed import Found


class Here:
    """The part of a `Context` that keys need."""

    def __init__(self, store: CarryingStore) -> None:
        self.store = store


def with_keys(path: Path, test: Callable[[IdempotencyKeys], Awaitable[None]]) -> None:
    async def main() -> None:
        store = SqliteStore(path / "state.db")
        try:
            await test(IdempotencyKeys(Here(CarryingStore(store))))  # type: ignore[arg-type]
        finally:
            await store.close()

    asyncio.run(main())


async def attempted(keys: IdempotencyKeys, key: str, principal: str | None = "ann", fingerprint: str = "f") -> Attempt:
    attempt = await keys.begin(principal, key, fingerprint)
    assert isinstance(attempt, Attempt)
    return attempt


async def done(keys: IdempotencyKeys, key: str, principal: str = "ann", body: bytes = b"{}") -> None:
    attempt = await attempted(keys, key, principal)
    await attempt.answered(201, "application/json", body)
    attempt.close()


def test_the_record_is_in_the_transaction_of_the_change(tmp_path: Path) -> None:
    async def test(keys: IdempotencyKeys) -> None:
        store = keys.context.store
        attempt = await attempted(keys, "k")
        carried.current.set(attempt)
        with pytest.raises(TransactionConflict):
            await store.transact([Compare("/networks/acme/a", 7)], [Put("/networks/acme/a", b"x")])
        assert not (await store.list("/idempotency/")).entries, "what fails leaves no record"
        revision = await store.transact([], [Put("/networks/acme/a", b"x")])
        [entry] = (await store.list("/idempotency/")).entries
        assert entry.revision == revision
        later = await store.transact([], [Put("/networks/acme/b", b"x")])
        [entry] = (await store.list("/idempotency/")).entries
        assert entry.revision < later, "the second transaction carries nothing"
        attempt.close()
        found = await keys.begin("ann", "k", "f")
        assert isinstance(found, Found) and found.value.status is None and found.revision == revision

    with_keys(tmp_path, test)


def test_a_key_ends_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(keys: IdempotencyKeys) -> None:
        await done(keys, "k")
        assert isinstance(await keys.begin("ann", "k", "f"), Found)
        now = time.time()
        monkeypatch.setattr(idempotency.time, "time", lambda: now + idempotency.LIFE + 1)  # type: ignore[attr-defined]
        (await attempted(keys, "k", fingerprint="another")).close()

    with_keys(tmp_path, test)


def test_a_principal_has_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "MAX_KEYS", 3)

    async def test(keys: IdempotencyKeys) -> None:
        for number in range(3):
            await done(keys, f"k{number}")
        fresh = IdempotencyKeys(keys.context)  # as after a restart
        for each in (keys, fresh):
            with pytest.raises(TooManyRequests) as raised:
                await each.begin("ann", "one more", "f")
            assert raised.value.retry_after and 86_000 < raised.value.retry_after <= idempotency.LIFE
            assert isinstance(await each.begin("ann", "k1", "f"), Found), "those that are there are answered"
            (await attempted(each, "k1", "ben")).close()
        now = time.time()
        monkeypatch.setattr(idempotency.time, "time", lambda: now + idempotency.LIFE + 1)  # type: ignore[attr-defined]
        (await attempted(fresh, "one more")).close()

    with_keys(tmp_path, test)


def test_a_running_request_is_told_to_wait(tmp_path: Path) -> None:
    async def test(keys: IdempotencyKeys) -> None:
        attempt = await attempted(keys, "k")
        with pytest.raises(Conflict) as raised:
            await keys.begin("ann", "k", "f")
        assert raised.value.retry_after == 1.0
        with pytest.raises(IdempotencyKeyReused):
            await keys.begin("ann", "k", "g")
        (await attempted(keys, "k", "ben")).close()
        attempt.close()
        (await attempted(keys, "k")).close()

    with_keys(tmp_path, test)


@pytest.mark.parametrize(
    ("status", "committed", "body", "kept"),
    [
        (201, True, b"{}", b"{}"),
        (201, False, b"{}", b"{}"),
        (201, True, b"x" * (MAX_ANSWER + 1), None),
        (500, True, b"{}", b"{}"),
    ],
)
def test_what_is_kept_of_an_answer(
    status: int, committed: bool, body: bytes, kept: bytes | None, tmp_path: Path
) -> None:
    async def test(keys: IdempotencyKeys) -> None:
        attempt: Any = await attempted(keys, "k")
        if committed:
            await keys.context.store.transact([], list(attempt.writes()))
            attempt.committed()
        await attempt.answered(status, "application/json", body)
        attempt.close()
        found = await keys.begin("ann", "k", "f")
        assert isinstance(found, Found) and (found.value.status, found.value.body) == (status, kept)

    with_keys(tmp_path, test)


def test_a_request_that_commits_nothing_is_recorded_with_its_answer(tmp_path: Path) -> None:
    """As `kill`: the transaction of the answer runs in the same context, and carries nothing more."""

    async def test(keys: IdempotencyKeys) -> None:
        attempt = await attempted(keys, "k")
        carried.current.set(attempt)
        await attempt.answered(204, "", b"")
        attempt.close()
        found = await keys.begin("ann", "k", "f")
        assert isinstance(found, Found) and (found.value.status, found.value.body) == (204, b"")

    with_keys(tmp_path, test)


def test_an_error_that_changed_nothing_is_not_kept(tmp_path: Path) -> None:
    async def test(keys: IdempotencyKeys) -> None:
        attempt = await attempted(keys, "k")
        await attempt.answered(400, "application/problem+json", b"{}")
        attempt.close()
        (await attempted(keys, "k", fingerprint="corrected")).close()
        assert not (await keys.context.store.list(IDEMPOTENCY.prefix_all())).entries

    with_keys(tmp_path, test)
