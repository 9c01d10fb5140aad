"""Deletion of network devices in the background, in groups.

Unregistering a device waits for an RCU grace period and then for all RCU callbacks (rcu_barrier() in netdev_run_todo(),
net/core/dev.c), which takes 15 ms or more. Callers need not wait for that once the rules drop all packets of the
device. So a device to be deleted is only marked, by its *group* (ip-link(8)), and one thread deletes whole groups,
whose devices share the wait.

Meanwhile the kernel holds the lock that every network change needs (rtnl_lock()), for milliseconds for each bridge port
even in a group. So groups are small, and after each the thread sleeps for as long as the deletion took: a launch during
the deletion of a thousand devices waits for a few of them, not for all.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Final, Protocol

log = logging.getLogger("insula.network")
_GONE: Final = 0x696E0000
_GROUPS: Final = 0x10000
_TOGETHER: Final = 8


def group_of(count: int) -> int:
    """Return the group of the `count`th port that is marked; eight successive ports have the same."""
    return _GONE + count // _TOGETHER % _GROUPS


def is_gone(group: int) -> bool:
    """Whether a device of this group is marked for deletion."""
    return _GONE <= group < _GONE + _GROUPS


class MarkedDevices(Protocol):
    def delete_marked(self) -> bool:
        """Delete the devices of one group; returns whether there are more groups."""


class DeferredDeletion:
    """A thread that deletes marked devices, started when first needed; `close` waits for the current deletion."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[MarkedDevices | None] = queue.SimpleQueue()
        self._pending: set[MarkedDevices] = set()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def wake(self, marked: MarkedDevices) -> None:
        """Schedule the deletion of marked devices."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="insula-deletion", daemon=True)
                self._thread.start()
            if marked not in self._pending:
                self._pending.add(marked)
                self._waiting.put(marked)

    def close(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
        if thread:
            self._waiting.put(None)
            thread.join()

    def _work(self) -> None:
        while (marked := self._waiting.get()) is not None:
            with self._lock:  # devices marked after this schedule another run
                self._pending.discard(marked)
            while self._thread and self._delete(marked):
                pass

    def _delete(self, marked: MarkedDevices) -> bool:
        started = time.monotonic()
        try:
            more = marked.delete_marked()
        except Exception:  # the next `apply` deletes them; the thread must go on for other tenants
            log.exception("cannot delete network devices; the next repair tries again")
            return False
        if more:
            time.sleep(time.monotonic() - started)
        return more
