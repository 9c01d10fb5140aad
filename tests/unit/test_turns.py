"""Turns of tenants' long works: who waits for whom."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from insula.control.turns import Turns

EACH, MORE, ALL = 3, 2, 5


class Works:
    """Works that go on until they are ended."""

    def __init__(self) -> None:
        self.turns = Turns(EACH, MORE, ALL)
        self.running: list[tuple[str, int]] = []
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._ends: dict[tuple[str, int], asyncio.Event] = {}
        self._number = 0

    async def begin(self, tenant: str) -> tuple[str, int]:
        self._number += 1
        work = tenant, self._number
        self._ends[work] = asyncio.Event()
        self._tasks[work] = asyncio.create_task(self._work(work))
        await settled()
        return work

    async def _work(self, work: tuple[str, int]) -> None:
        async with self.turns.turn(work[0]):
            self.running.append(work)
            try:
                await self._ends[work].wait()
            finally:
                self.running.remove(work)

    async def end(self, work: tuple[str, int]) -> None:
        self._ends[work].set()
        await settled()

    async def cancel(self, work: tuple[str, int]) -> None:
        self._tasks[work].cancel()
        await settled()

    @property
    def waiting(self) -> list[tuple[str, int]]:
        return [work for work, task in self._tasks.items() if not task.done() and work not in self.running]

    @property
    def left(self) -> list[tuple[str, int]]:
        return [work for work, task in self._tasks.items() if not task.done()]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(test: Callable[[Works], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        works = Works()
        try:
            await test(works)
        finally:
            for work in works.left:
                await works.cancel(work)

    asyncio.run(whole())


def test_one_tenant_has_so_many_and_the_next_one_waits_for_its_own() -> None:
    async def body(works: Works) -> None:
        first, *_, last = [await works.begin("a") for _ in range(EACH + 1)]
        assert works.waiting == [last]
        await works.end(first)
        assert works.waiting == [] and last in works.running

    run(body)


def test_the_first_of_a_tenant_does_not_wait_for_others_that_never_end() -> None:
    async def body(works: Works) -> None:
        for tenant in "aaabbb":
            await works.begin(tenant)
        assert Counter(tenant for tenant, _ in works.running) == {"a": 3, "b": 1}, "two beyond the first ones"
        mine = await works.begin("c")
        assert mine in works.running
        more = await works.begin("c")
        assert more in works.waiting, "the control: there are no more"

    run(body)


def test_there_is_a_bound_for_all_together() -> None:
    async def body(works: Works) -> None:
        some = [await works.begin(str(number)) for number in range(ALL + 1)]
        assert works.waiting == some[-1:]
        await works.end(some[0])
        assert works.waiting == []

    run(body)


def test_one_that_is_cancelled_while_it_waits_takes_no_turn() -> None:
    async def body(works: Works) -> None:
        first, *_, waiting, last = [await works.begin("a") for _ in range(EACH + 2)]
        await works.cancel(waiting)
        await works.end(first)
        assert last in works.running

    run(body)


def test_one_that_is_cancelled_as_its_turn_comes_gives_it_back() -> None:
    async def body(works: Works) -> None:
        first, *_, waiting, last = [await works.begin("a") for _ in range(EACH + 2)]
        works._ends[first].set()
        while len(works.turns._waiting) == 2:  # until it is called, and before it goes on
            await asyncio.sleep(0)
        works._tasks[waiting].cancel()
        await settled()
        assert last in works.running and waiting not in works.left

    run(body)


@given(
    steps=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["begin", "end", "cancel"]), st.integers(0)))
)
def test_bounds_hold_and_nobody_waits_without_a_reason(steps: list[tuple[str, str, int]]) -> None:
    async def body(works: Works) -> None:
        for tenant, step, which in steps:
            some: list[tuple[str, int]] = {"begin": [], "end": works.running, "cancel": works.left}[step]
            act: Awaitable[object] | None = None
            if step == "begin":
                act = works.begin(tenant)
            elif some:
                chosen = some[which % len(some)]
                act = works.end(chosen) if step == "end" else works.cancel(chosen)
            if act:
                await act
            running = Counter(tenant for tenant, _ in works.running)
            extra = running.total() - len(running)
            assert max(running.values(), default=0) <= EACH and extra <= MORE and running.total() <= ALL
            for tenant, _ in works.waiting:
                mine = running[tenant]
                assert running.total() == ALL or (mine and (mine == EACH or extra == MORE))

    run(body)
