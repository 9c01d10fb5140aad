"""Locks for each name: they exclude each other, and unused ones are dropped."""

from __future__ import annotations

import asyncio
import gc
from functools import partial

from insula.control.workers import Locks, Workers


def test_locks_of_one_name_exclude_each_other_and_leave_nothing() -> None:
    async def main() -> None:
        locks, inside, kept = Locks(), set[str](), list[int]()

        async def work(name: str) -> None:
            async with locks[name]:
                assert name not in inside
                inside.add(name)
                kept.append(len(locks))
                await asyncio.sleep(0)
                inside.remove(name)

        await asyncio.gather(*(work(name) for name in "abaab"))
        assert max(kept) == 2 and len(kept) == 5
        assert len(locks) == 0

    asyncio.run(main())


def test_a_lock_is_dropped_when_its_waiter_gives_up() -> None:
    async def main() -> None:
        locks = Locks()
        async with locks["a"]:
            waiting = asyncio.ensure_future(locks["a"].acquire())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert len(locks) == 1
        del waiting
        await asyncio.sleep(0)
        gc.collect()  # the traceback of who gave up
        assert len(locks) == 0

    asyncio.run(main())


def test_workers_remember_no_tenant() -> None:
    async def main() -> None:
        workers = Workers(1)
        found = await asyncio.gather(*(workers.do(f"t{each % 3}", partial(int, each)) for each in range(9)))
        assert found == list(range(9))
        assert len(workers._turns) == 0

    asyncio.run(main())
