"""Threads for work that computes, and whose size an instance chooses.

A thread that computes holds the interpreter's lock. After each system call the event loop waits until that thread gives
way (`sys.setswitchinterval`), behind every other thread that waits too. So such work is done one at a time for each
tenant, and with few threads in all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


async def in_thread(pool: Executor | None, work: Callable[[], T]) -> T:
    """What `work` returns, done in a thread of `pool` (None: the loop's own).

    When the caller is cancelled it first waits for the thread, which still uses what is the caller's.
    """
    running = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class Locks:
    """A lock for each name, kept for as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __getitem__(self, name: str) -> asyncio.Lock:
        if (lock := self._locks.get(name)) is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def __len__(self) -> int:
        return len(self._locks)


class Workers:
    """`threads` for all tenants together; None are those of the event loop's default executor."""

    def __init__(self, threads: int | None = None) -> None:
        self._pool = None if threads is None else ThreadPoolExecutor(threads, "insula-worker")
        self._turns = Locks()

    async def do(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns, after what was asked for this tenant before."""
        async with self._turns[tenant]:
            return await in_thread(self._pool, work)
