"""Deletion of network devices in the background, in groups.

Unregistering a device waits until nobody can hold it any more: for a grace period of RCU and then for all callbacks
of it (rcu_barrier() in netdev_run_todo(), net/core/dev.c), 15 ms and more. Nobody need wait for that once the rules let
nothing of the device through. So a device that goes is only marked, by its *group* (ip-link(8)), and one thread deletes
whole groups: their devices wait together.

All that time the kernel holds the one lock that every change of a network needs (rtnl_lock()), and a port of a bridge
takes milliseconds of it even in a group. So groups are small, and the thread rests as long as it worked: a launch while
a thousand others go waits for a few of them, not for all.
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
    """The group of the `count`th port that was marked; a few have the same."""
    return _GONE + count // _TOGETHER % _GROUPS


def is_gone(group: int) -> bool:
    """Whether a device of this group is marked for deletion."""
    return _GONE <= group < _GONE + _GROUPS


class MarkedDevices(Protocol):
    def delete_marked(self) -> bool:
        """Delete the devices of one group; whether there are more."""


class DeferredDeletion:
    """One thread, from the first need on; `close` waits for what it is doing."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[MarkedDevices | None] = queue.SimpleQueue()
        self._pending: set[MarkedDevices] = set()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def wake(self, marked: MarkedDevices) -> None:
        """Delete what is marked there, soon."""
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
            with self._lock:  # what is marked from here on wakes us again
                self._pending.discard(marked)
            while self._thread and self._delete(marked):
                pass

    def _delete(self, marked: MarkedDevices) -> bool:
        started = time.monotonic()
        try:
            more = marked.delete_marked()
        except Exception:  # the next sweep finds what is left; others wait for this thread
            log.exception("devices that should go stay for now")
            return False
        if more:
            time.sleep(time.monotonic() - started)
        return more
