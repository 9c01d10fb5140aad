"""`Tasks`: background tasks of the daemon. They end with the daemon."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from insula.model.errors import Failed, InsulaError

log = logging.getLogger("insula.control")
T = TypeVar("T")
LIMIT = 30.0
"""Seconds that one action on this host may take."""


class Tasks:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that runs `work`. An exception that is not an InsulaError is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, InsulaError):
            log.error("a task failed", exc_info=error)

    async def close(self) -> None:
        """Cancel all tasks, and return when they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def within_limit(what: str, work: Awaitable[T]) -> T:
    """Await `work` and return its result. After `LIMIT` seconds it is cancelled; Failed says so."""
    try:
        async with asyncio.timeout(LIMIT) as limit:
            return await work
    except TimeoutError:
        if not limit.expired():
            raise
        raise Failed(f"{what} takes more than {LIMIT:g} s", "it is tried again") from None


async def together(*work: Awaitable[object]) -> None:
    """Await all, side by side, to their ends; then raise what the first one raised, in the given order."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
