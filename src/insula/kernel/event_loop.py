"""An event loop over epoll(7), for small processes: descriptors, timers, and work for idle moments.

A handler or timer that raises is logged and called again after `RETRY` seconds. Nothing that is watched is ever
dropped because of an error: these processes hold what containers need.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time

from insula.log import write as report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

RETRY = 1.0
"""Seconds until a handler or timer that failed is called again."""


class EventLoop:
    """Calls a handler for each ready descriptor. `name` is the source in log lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._poll = select.epoll()
        self._handlers: dict[int, tuple[int, Callable[[int], object]]] = {}  # mask and handler, by descriptor
        self._failed: dict[int, tuple[int, Callable[[int], object]]] = {}  # the same, until it is called again
        self._timers: list[tuple[float, int, Callable[[], object]]] = []  # a heap; the number keeps it from comparing
        self._numbers = itertools.count()
        self._idle_after = 0.0  # idle work failed: none before this moment

    # -- descriptors -------------------------------------------------------------------------------------------------

    def watch(self, fd: int, handler: Callable[[int], object], mask: int = select.EPOLLIN) -> None:
        """Call `handler` with the events of `fd` when it is ready for `mask`; replaces an earlier handler.

        With an empty mask `fd` is not watched: epoll would report the end of a pipe for ever.
        """
        if not mask:
            self.unwatch(fd)
            return
        self._failed.pop(fd, None)
        known = self._handlers.get(fd)
        if known is None:
            self._poll.register(fd, mask)
        elif known[0] != mask:
            self._poll.modify(fd, mask)
        self._handlers[fd] = mask, handler

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`, before it is closed. Nothing happens if it is not watched."""
        self._failed.pop(fd, None)
        if self._handlers.pop(fd, None):
            self._poll.unregister(fd)

    def is_watched(self, fd: int) -> bool:
        """Whether `fd` has a handler now."""
        return fd in self._handlers

    # -- timers ------------------------------------------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Call `action` once, after `seconds`."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), action))

    # -- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        idle_timeout: Callable[[], float | None] = lambda: None,
        idle: Callable[[], object] = lambda: None,
    ) -> NoReturn:
        """Serve for ever. `idle` is called when nothing happened for `idle_timeout()` seconds; None means never."""
        while True:
            self.turn(idle_timeout, idle)

    def turn(self, idle_timeout: Callable[[], float | None], idle: Callable[[], object]) -> None:
        """One round: due timers, then one wait, then the handlers of what is ready, or idle work."""
        until_timer = self._run_timers()
        quiet = idle_timeout()
        if quiet is not None:
            quiet = max(quiet, self._idle_after - time.monotonic())
        waits = [each for each in (until_timer, quiet) if each is not None]
        events = self._poll.poll(max(0.0, min(waits)) if waits else None)
        for fd, ready in events:
            if found := self._handlers.get(fd):
                self._call(fd, ready, *found)
        if not events and quiet is not None and (until_timer is None or quiet <= until_timer):
            try:
                idle()
            except Exception as error:
                report(self.name, "idle work failed, and is tried again", error)
                self._idle_after = time.monotonic() + RETRY

    def _call(self, fd: int, events: int, mask: int, handler: Callable[[int], object]) -> None:
        try:
            handler(events)
        except Exception as error:
            report(self.name, "a handler failed, and is called again", error)
            if self._handlers.get(fd) == (mask, handler):  # else it was closed, or has another handler by now
                self.unwatch(fd)
                self._failed[fd] = mask, handler
                self.later(RETRY, lambda: self._watch_again(fd, handler))

    def _watch_again(self, fd: int, handler: Callable[[int], object]) -> None:
        mask, waiting = self._failed.get(fd, (0, None))
        if waiting is handler:
            self.watch(fd, handler, mask)

    def _run_timers(self) -> float | None:
        """Call what is due; seconds until the next."""
        while self._timers and self._timers[0][0] <= time.monotonic():
            action = heapq.heappop(self._timers)[2]
            try:
                action()
            except Exception as error:
                report(self.name, "a timer failed, and is called again", error)
                self.later(RETRY, action)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
