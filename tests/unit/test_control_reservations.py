"""Reservations in a real store: only one owner gets a value, also with concurrent requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from insula.control.allocation.reservations import Allocator, Allocators, Reservation
from insula.control.allocation.transaction import Proposal, allocate
from insula.model.errors import Conflict
from insula.store.protocol import Compare, Put, Store, TransactionConflict
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


async def commit(store: Store, *reservations: Reservation) -> int:
    return await store.transact([each.absent() for each in reservations], [each.put() for each in reservations])


def test_a_reservation_belongs_to_its_first_owner(tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        first, second = Reservation("vni", "5000", "acme/net"), Reservation("vni", "5000", "globex/net")
        await commit(store, first)
        with pytest.raises(TransactionConflict) as conflict:
            await commit(store, Reservation("mac", "02::", "x"), second)
        assert conflict.value.key == second.key
        assert {e.key: e.value for e in (await store.list("/")).entries} == {"/claims/vni/5000": b"acme/net"}
        await store.transact([], [first.delete()])
        await commit(store, second)

    run(tmp_path, scenario)


def test_the_lowest_free_number_is_chosen_and_reserved(tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        await commit(store, Reservation("n", "0", "x"), Reservation("n", "2", "x"))
        allocator = Allocator(store, "n")
        chosen = await asyncio.gather(*(allocator.lowest(0, 6, "numbers") for _ in range(4)))
        assert sorted(chosen) == [1, 3, 4, 5]
        with pytest.raises(Conflict, match="all 6 numbers are in use"):
            await allocator.lowest(0, 6, "numbers")
        allocator.release("3")
        assert await allocator.lowest(0, 6, "numbers") == 3
        allocator.invalidate()  # none of these was committed
        assert await allocator.lowest(0, 6, "numbers") == 1

    run(tmp_path, scenario)


def test_a_random_number_is_free_and_tells_nothing_of_others(tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        allocator = Allocator(store, "n")
        chosen = [await allocator.random(4, "numbers") for _ in range(4)]
        assert sorted(chosen) == [0, 1, 2, 3]
        with pytest.raises(Conflict, match="all 4 numbers are in use"):
            await allocator.random(4, "numbers")
        allocator.release("1")
        assert await allocator.random(4, "numbers") == 1
        wide = [await Allocator(store, "wide").random(1 << 24, "numbers") for _ in range(4)]
        assert max(wide) - min(wide) > 1000, "four in a row: once in 10^11 runs"

    run(tmp_path, scenario)


Proposer = Callable[[], Awaitable[Proposal[int]]]


def proposer(store: Store, allocators: Allocators, owner: str) -> Proposer:
    async def propose() -> Proposal[int]:
        number = await allocators.of("n").lowest(0, 1000, "numbers")
        writes = [Put(f"/owners/{owner}", str(number).encode())]
        return Proposal(number, [Reservation("n", str(number), owner)], [Compare(f"/owners/{owner}", 0)], writes)

    return propose


def test_two_daemons_never_share_a_number(tmp_path: Path) -> None:
    """Their allocators know nothing of each other; the transaction decides, and the slower one chooses again."""

    async def scenario(store: Store) -> None:
        lost: list[str] = []
        both = Allocators(store), Allocators(store)

        async def own(owner: int) -> int:
            allocators = both[owner % 2]
            propose = proposer(store, allocators, str(owner))
            return (await allocate(store, allocators, propose, lambda key, _: lost.append(key))).value

        numbers = await asyncio.gather(*(own(owner) for owner in range(40)))
        assert sorted(numbers) == list(range(40))
        assert lost and all(key.startswith("/claims/n/") for key in lost), "they did meet"

    run(tmp_path, scenario)


@pytest.mark.parametrize("error", [Conflict("no", "hint"), asyncio.CancelledError()])
def test_uncommitted_reservations_are_released(tmp_path: Path, error: BaseException) -> None:
    async def scenario(store: Store) -> None:
        allocators = Allocators(store)
        propose = proposer(store, allocators, "a")

        def refuse(key: str, value: int) -> None:
            assert (key, value) == ("/owners/a", 1)
            raise error

        made = await allocate(store, allocators, propose, refuse)
        assert (made.value, made.revision) == (0, (await store.list("/owners/")).entries[0].revision)
        with pytest.raises(type(error)):
            await allocate(store, allocators, propose, refuse)
        assert await allocators.of("n").lowest(0, 1000, "numbers") == 1, "it is free again, and the first is not"

    run(tmp_path, scenario)


def test_a_permanent_conflict_is_an_error(tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        allocators = Allocators(store)
        propose = proposer(store, allocators, "a")
        await allocate(store, allocators, propose, lambda *_: None)
        with pytest.raises(Conflict, match="too many concurrent changes"):
            await allocate(store, allocators, propose, lambda *_: None)

    run(tmp_path, scenario)
