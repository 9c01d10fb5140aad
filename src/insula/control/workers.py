"""`Workers`: threads for computations whose size an instance chooses.

A computing thread holds the interpreter's lock (GIL). After each system call the event loop waits until that thread
releases it (`sys.setswitchinterval`), and so does every other waiting thread. So such work is done one at a time for
each tenant, with few threads in all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


async def in_thread(pool: Executor | None, work: Callable[[], T]) -> T:
    """Run `work` in a thread of `pool` (None is the loop's default executor) and return its result.

    A caller that is cancelled first waits for the thread, which still uses objects of the caller.
    """
    running = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class Locks:
    """Locks by name. A lock exists while a task holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __getitem__(self, name: str) -> asyncio.Lock:
        if (lock := self._locks.get(name)) is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def __len__(self) -> int:
        return len(self._locks)


class Workers:
    """A pool of `threads` for all tenants together; None is the event loop's default executor."""

    def __init__(self, threads: int | None = None) -> None:
        self._pool = None if threads is None else ThreadPoolExecutor(threads, "insula-worker")
        self._turns = Locks()

    async def do(self, tenant: str, work: Callable[[], T]) -> T:
        """Run `work` in a thread, after earlier work for this tenant, and return its result."""
        async with self._turns[tenant]:
            return await in_thread(self._pool, work)
