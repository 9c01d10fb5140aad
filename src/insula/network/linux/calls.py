"""Turns of the threads that call a fabric: one at a time for each tenant, and none once the fabric closes.

A thread can't be stopped from outside: it goes on when whoever started it was cancelled, or has lost patience. So the
thread itself holds the lock of the tenant whose handles it uses, and `close` waits until no thread uses any.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeVar, cast

from insula.model.errors import Failed, Unavailable

PATIENCE: Final = 60.0
"""Seconds that a call waits for the one before it, and `close` for those that run."""
_NOT_OPEN: Final = "networks are not open on this host"
_CLOSING: Final = "networks are being taken down on this host"
_HINT: Final = "start insulad, and then this"


class Calls:
    """Counts the calls that run. All are refused before `open` and after `close`."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._changed = threading.Condition()
        self._running = 0
        self._queues: dict[str, deque[object]] = {}  # of each tenant; the first runs
        self._refusal: str | None = _NOT_OPEN

    def open(self) -> None:
        """Allow calls."""
        with self._changed:
            self._refusal = None

    def close(self) -> None:
        """Refuse new calls, also those that wait for their turn, and wait for the end of those that run.

        Raises Failed if one runs on for too long; calls are refused all the same.
        """
        with self._changed:
            self._refusal = self._refusal or _CLOSING
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._running, self._patience):
                what = f"{self._running} changes of networks still run after {self._patience:g} s"
                raise Failed(what, "try again, and see insulad's log")

    @contextlib.contextmanager
    def any(self) -> Iterator[None]:
        """A call about the host, or about several tenants. Unavailable once the fabric closes."""
        with self._changed:
            self._check()
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def of(self, tenant: str) -> Iterator[None]:
        """A call about one tenant, when those before it have ended, in order. Not to be nested for the same tenant.

        Unavailable once the fabric closes, and if those before it take too long.
        """
        with self._changed:
            ticket = object()
            queue = self._queues.setdefault(tenant, deque())
            queue.append(ticket)
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: self._refusal or queue[0] is ticket, self._patience):
                    raise Unavailable(f"networks of tenant {tenant} are still being changed", "try again")
            with self.any():
                yield
        finally:
            with self._changed:
                queue.remove(ticket)
                if not queue:
                    del self._queues[tenant]
                self._changed.notify_all()

    def _check(self) -> None:
        if self._refusal:
            raise Unavailable(self._refusal, _HINT)


def not_open() -> Unavailable:
    """The error for a call before `open`."""
    return Unavailable(_NOT_OPEN, _HINT)


class Called(Protocol):
    """What has `Calls`."""

    _calls: Calls


Method = TypeVar("Method", bound=Callable[..., Any])


def about_tenant(method: Method) -> Method:
    """A method whose first argument is a `Tenant`, as a call about that one."""

    @functools.wraps(method)
    def call(self: Called, tenant: Any, *args: Any, **kwargs: Any) -> Any:
        with self._calls.of(tenant.name):
            return method(self, tenant, *args, **kwargs)

    return cast(Method, call)


def about_host(method: Method) -> Method:
    """A method as a call about the host."""

    @functools.wraps(method)
    def call(self: Called, *args: Any, **kwargs: Any) -> Any:
        with self._calls.any():
            return method(self, *args, **kwargs)

    return cast(Method, call)
