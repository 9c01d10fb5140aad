"""Locks for each name: they exclude each other, and none is kept when nobody needs it."""

from __future__ import annotations

import asyncio

from insula.control.workers import Locks, Workers


def test_locks_of_one_name_exclude_each_other_and_leave_nothing() -> None:
    async def main() -> None:
        locks, order = Locks(), list[str]()

        async def work(name: str, said: str) -> None:
            async with locks[name]:
                order.append(f"{said} in")
                await asyncio.sleep(0)
                assert len(locks) == 2, "both names are in use"
                await asyncio.sleep(0)
                order.append(f"{said} out")

        await asyncio.gather(work("a", "1"), work("b", "2"), work("a", "3"))
        assert order == ["1 in", "2 in", "1 out", "2 out", "3 in", "3 out"] or order.index("1 out") < order.index(
            "3 in"
        )
        assert len(locks) == 0

    asyncio.run(main())


def test_a_lock_of_one_who_gave_up_waiting_is_not_kept() -> None:
    async def main() -> None:
        locks = Locks()
        async with locks["a"]:
            waiting = asyncio.ensure_future(locks["a"].acquire())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            del waiting
            assert len(locks) == 1
        assert len(locks) == 0

    asyncio.run(main())


def test_workers_remember_no_tenant() -> None:
    async def main() -> None:
        workers = Workers(1)
        found = await asyncio.gather(
            *(workers.do(f"t{number % 3}", lambda number=number: number) for number in range(9))
        )  # type: ignore[misc]
        assert found == list(range(9))
        assert len(workers._turns) == 0

    asyncio.run(main())
