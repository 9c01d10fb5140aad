"""Serialise the calls of a fabric: one at a time for each tenant, and none after the fabric has closed.

A thread can't be stopped from outside: it continues after its caller was cancelled or timed out. So the thread itself
holds the lock of the tenant whose handles it uses, and `close` waits until no thread uses any.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeVar, cast

from insula.model.errors import Failed, NotFound, Unavailable
from insula.model.objects import Tenant

TIMEOUT: Final = 60.0
"""Seconds that a call waits for earlier ones, and `close` for running ones."""
_NOT_OPEN: Final = "networks are not open on this host"
_CLOSING: Final = "networks are being taken down on this host"
_HINT: Final = "start insulad, and try again"


class Calls:
    """The running calls. New ones are refused before `open` and after `close`."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self._timeout = timeout
        self._changed = threading.Condition()
        self._running = 0
        self._queues: dict[str, deque[object]] = {}  # by tenant; the first call of a queue runs
        self._refusal: str | None = _NOT_OPEN

    def open(self) -> None:
        """Allow calls."""
        with self._changed:
            self._refusal = None

    def close(self) -> None:
        """Refuse new and waiting calls, and wait for running ones. Failed after the timeout; calls stay refused."""
        with self._changed:
            self._refusal = self._refusal or _CLOSING
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._running, self._timeout):
                what = f"{self._running} changes of networks still run after {self._timeout:g} s"
                raise Failed(what, "try again, and see insulad's log")

    @contextlib.contextmanager
    def any(self) -> Iterator[None]:
        """Run a call about the host, or about several tenants. Unavailable when the fabric is closed."""
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
        """Run a call about one tenant after its earlier calls, in order. Can't be nested for one tenant.

        Unavailable when the fabric is closed, and if the earlier calls take too long.
        """
        with self._changed:
            ticket = object()
            queue = self._queues.setdefault(tenant, deque())
            queue.append(ticket)
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: self._refusal or queue[0] is ticket, self._timeout):
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
    """Return the error for a call before `open`."""
    return Unavailable(_NOT_OPEN, _HINT)


class HasCalls(Protocol):
    """An object whose methods can be decorated with `about_tenant` and `about_host`."""

    _calls: Calls


Method = TypeVar("Method", bound=Callable[..., Any])


def about_tenant(method: Method) -> Method:
    """Decorate a method whose first argument is a `Tenant`: it runs as a call about that tenant."""

    @functools.wraps(method)
    def call(self: HasCalls, tenant: Any, *args: Any, **kwargs: Any) -> Any:
        with self._calls.of(tenant.name):
            return method(self, tenant, *args, **kwargs)

    return cast(Method, call)


def about_host(method: Method) -> Method:
    """Decorate a method: it runs as a call about the host."""

    @functools.wraps(method)
    def call(self: HasCalls, *args: Any, **kwargs: Any) -> Any:
        with self._calls.any():
            return method(self, *args, **kwargs)

    return cast(Method, call)


def no_namespace(tenant: Tenant) -> NotFound:
    return NotFound(f"tenant {tenant.name} has no network namespace", "insulad will make it; see `insula status`")
