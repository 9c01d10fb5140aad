"""Claims on the real store: what only one may have, only one gets, whoever races."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from insula.control import claims
from insula.control.claims import Claim, Pool
from insula.model.errors import Conflict
from insula.store.protocol import Put, Store, TransactionConflict
from insula.store.sqlite import SqliteStore
from tests.support.wait import patiently


def run(path: Path, scenario: Callable[[Store], Awaitable[None]]) -> None:
    async def main() -> None:
        store = SqliteStore(path / "state.db")
        try:
            await asyncio.wait_for(scenario(store), patiently(20))
        finally:
            await store.close()

    asyncio.run(main())


def test_a_claim_belongs_to_its_first_owner(tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        first, second = Claim("vni", "5000", "acme/net"), Claim("vni", "5000", "globex/net")
        await claims.commit(store, [first], [], [Put("/a", b"")])
        with pytest.raises(TransactionConflict) as conflict:
            await claims.commit(store, [Claim("mac", "02::", "x"), second], [], [Put("/b", b"")])
        assert claims.lost(conflict.value, [second]) == second
        assert claims.lost(conflict.value, [Claim("vni", "5001", "x")]) is None
        assert {e.key: e.value for e in (await store.list("/")).entries} == {"/a": b"", "/claims/vni/5000": b"acme/net"}
        await store.transact([], claims.release([first]))
        await claims.commit(store, [second], [], [])

    run(tmp_path, scenario)


def test_the_lowest_free_number_is_chosen_and_reserved(tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        await claims.commit(store, [Claim("n", "0", "x"), Claim("n", "2", "x")], [], [])
        pool = Pool(store, "n")
        chosen = await asyncio.gather(*(pool.lowest(0, 6, "numbers") for _ in range(4)))
        assert sorted(chosen) == [1, 3, 4, 5]
        with pytest.raises(Conflict, match="all 6 numbers are in use"):
            await pool.lowest(0, 6, "numbers")
        pool.give_back("3")
        assert await pool.lowest(0, 6, "numbers") == 3
        pool.forget()  # none of these was committed
        assert await pool.lowest(0, 6, "numbers") == 1

    run(tmp_path, scenario)


def test_a_random_number_is_free_and_tells_nothing_of_others(tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        pool = Pool(store, "n")
        chosen = [await pool.random(4, "numbers") for _ in range(4)]
        assert sorted(chosen) == [0, 1, 2, 3]
        with pytest.raises(Conflict, match="all 4 numbers are in use"):
            await pool.random(4, "numbers")
        pool.give_back("1")
        assert await pool.random(4, "numbers") == 1
        wide = [await Pool(store, "wide").random(1 << 24, "numbers") for _ in range(4)]
        assert max(wide) - min(wide) > 1000, "four in a row: once in 10^11 runs"

    run(tmp_path, scenario)


def test_two_daemons_never_share_a_number(tmp_path: Path) -> None:
    """Two pools over one store know nothing of each other, as two daemons would; the transaction decides."""

    async def scenario(store: Store) -> None:
        async def own(pool: Pool, owner: str) -> int:
            for _ in range(100):
                number = await pool.lowest(0, 1000, "numbers")
                try:
                    await claims.commit(store, [Claim("n", str(number), owner)], [], [])
                    return number
                except TransactionConflict:
                    pool.forget()
            raise AssertionError("no number in 100 attempts")

        one, two = Pool(store, "n"), Pool(store, "n")
        numbers = await asyncio.gather(*(own((one, two)[i % 2], str(i)) for i in range(40)))
        assert sorted(numbers) == list(range(40))

    run(tmp_path, scenario)
