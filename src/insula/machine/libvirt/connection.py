"""A connection to a hypervisor, whose calls have time limits.

The library has none of its own: a call to a host that has gone away may take for ever. So each connection has a thread
that makes its calls, and callers wait for that thread as long as they want. After a call that took longer the
connection is given up with its thread, which ends when the library returns; the next call opens another.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit

from insula.machine.libvirt import errors, library
from insula.model.errors import Unavailable

T = TypeVar("T")
SECONDS: Final = 30.0
_MOST_STUCK = 4
_USER, _SECRETS = 2, (5, 7)  # VIR_CRED_AUTHNAME; PASSPHRASE, NOECHOPROMPT


class LibvirtConnection:
    """Calls to the hypervisor at `uri`. `password` returns that of the user in the URI. `SECONDS` is the limit."""

    def __init__(self, uri: str, password: Callable[[], str] | None = None, seconds: float = SECONDS) -> None:
        self.uri = uri
        self._password = password
        self._seconds = seconds
        self._lock = threading.Lock()
        self._caller: _Caller | None = None
        self._stuck: list[_Caller] = []

    def call(self, function: Callable[[Any, Any], T], guest: str = "", seconds: float | None = None) -> T:
        """Return what `function` returns, which is called with the library and an open connection. The errors of
        `errors.translate`; Unavailable after `seconds`."""
        limit = self._seconds if seconds is None else seconds
        caller = self._ready()
        future = caller.submit(lambda lib, opened: function(lib, opened))
        try:
            return future.result(limit)
        except TimeoutError:
            self._give_up(caller)
            raise Unavailable(
                f"{self.uri} does not answer within {limit:g} seconds", "look at the hypervisor"
            ) from None
        except caller.library.libvirtError as error:
            if caller.lost(error):
                self._give_up(caller)
            raise errors.translate(error, self.uri, guest) from error

    def close(self) -> None:
        with self._lock:
            caller, self._caller = self._caller, None
        if caller:
            caller.end()
            caller.join(self._seconds)

    def _ready(self) -> _Caller:
        lib = library.load()
        with self._lock:
            self._stuck = [each for each in self._stuck if each.is_alive()]
            if len(self._stuck) >= _MOST_STUCK:
                what = f"{self.uri} has not answered {_MOST_STUCK} calls yet"
                raise Unavailable(what, "look at the hypervisor; restart insulad when it answers again")
            if self._caller is None:
                self._caller = _Caller(lib, lambda: self._open(lib))
            return self._caller

    def _give_up(self, caller: _Caller) -> None:
        with self._lock:
            if self._caller is caller:
                self._caller = None
                self._stuck.append(caller)
        caller.end()

    def _open(self, lib: Any) -> Any:
        # before the call, because an exception in a callback of the library would be lost
        secret = self._password() if self._password else None
        user = unquote(urlsplit(self.uri).username or "root")

        def answer(credentials: list[list[Any]], _: object) -> int:
            """Fill in what the hypervisor asks for; -1 if that is not known."""
            for each in credentials:
                if each[0] != _USER and secret is None:
                    return -1
                each[4] = user if each[0] == _USER else secret
            return 0

        return lib.openAuth(self.uri, [[_USER, *_SECRETS], answer, None], 0)


class _Caller:
    """A thread with a connection, which is opened by its first call."""

    def __init__(self, lib: Any, connect: Callable[[], Any]) -> None:
        self.library = lib
        self._connect = connect
        self._calls: queue.SimpleQueue[tuple[Callable[[Any, Any], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="libvirt calls", daemon=True)
        self._opened: Any = None
        self._thread.start()

    def submit(self, function: Callable[[Any, Any], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future

    def end(self) -> None:
        """End the thread, after the calls that wait."""
        self._calls.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def lost(self, error: Any) -> bool:
        """Whether the connection is of no use after this error."""
        return self._opened is None or errors.connection_error(error.get_error_code(), "", "") is not None

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            try:
                if self._opened is None:
                    self._opened = self._connect()
                future.set_result(function(self.library, self._opened))
            except BaseException as error:
                future.set_exception(error)
            del call, function, future  # or the next wait would keep what they refer to
        if self._opened is not None:
            with contextlib.suppress(self.library.libvirtError):
                self._opened.close()
