"""`Keepers`: a few connections to the hypervisor, each with a thread, so that its calls keep nobody else waiting.

The time limit of a call (`insula.machine.libvirt.connection`) counts from its beginning, and not while it waits for a
thread. A hypervisor that hangs keeps these threads, and none of those that others use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar, cast

from insula.control.workers import in_thread
from insula.machine.hypervisor import GuestKeeper, Hypervisor

T = TypeVar("T")
_THREADS = 4


class Keepers:
    """`make` makes a connection, which is opened by its first call."""

    def __init__(self, make: Callable[[], Hypervisor]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(_THREADS, "insula-hypervisor")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._all: list[Hypervisor] = []

    async def do(self, work: Callable[[GuestKeeper], T]) -> T:
        """Return what `work` returns, which is called in a thread. Its errors, and those of `GuestKeeper`."""
        return await in_thread(self._pool, partial(self._call, work))

    def close(self) -> None:
        """Close the connections. What still waits is not done. Blocks."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for each in self._all:
                each.close()
            self._all.clear()

    def _call(self, work: Callable[[GuestKeeper], T]) -> T:
        keeper = getattr(self._own, "keeper", None)
        if keeper is None:
            keeper = self._own.keeper = self._make()
            with self._lock:
                self._all.append(keeper)
        return work(cast(GuestKeeper, keeper))
