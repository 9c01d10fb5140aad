"""Requests that are open: each is ended when its sender loses the right to it.

A request may last for days: logs, events, attach, exec. One revocation may end a thousand of them, and to cancel one
takes a third of a millisecond, because all that it runs is unwound. So streams end in steps. At once they are silent:
nothing else of them is sent. Then the client of each gets the last piece, with the reason. Then what they run is
cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextvars import Context
from typing import Any

from litestar.types import Send

from insula.api.audit import AuditedRequest
from insula.api.streams import end_of
from insula.control.allocation.in_flight import Held
from insula.control.identities.authority import Authority
from insula.control.identities.cache import IdentityCache
from insula.model.errors import Denied, InsulaError, Unauthenticated, Unavailable

ENDS_ITSELF = "ends itself"
"""Set in the state of a request that sends its last piece itself when it is cancelled."""
_TURN = 256  # streams that are ended before other tasks may run, which takes some 20 ms
_PATIENCE = 1.0  # seconds that the answer to a revocation waits for the end of streams


class OpenRequest:
    """A request. `answering`: its answer has begun, which is of the type `media`. `unchecked`: rights have changed
    before that. `complete`: all of the answer was sent. `why` is the error that it was ended with, `silent` says that
    it is a stream whose last piece follows, and `last` sends that."""

    def __init__(self, all_: OpenRequests, task: asyncio.Future[None], entry: AuditedRequest, send: Send) -> None:
        self.task = task
        self.authority: Authority = entry.authority
        self.why: InsulaError | None = None
        self.answering = False
        self.unchecked = False
        self.complete = False
        self.silent = False
        self.media = ""
        self.last: asyncio.Task[None] | None = None
        self._all = all_
        self._entry = entry
        self._send = send
        self._state: Any = entry.state
        self.holds: list[Held] = self._state.setdefault("holds", [])

    def end(self, why: InsulaError) -> None:
        """End it. What it runs finds the reason in the state of its scope, as "ended"."""
        if self.why is None:
            self.why = self._state["ended"] = why
            self._all.end(self)

    def is_stream(self) -> bool:
        """Whether its answer is a stream with a last piece for the reason of its end."""
        ends = not isinstance(self.why, Unavailable) and not self._state.get(ENDS_ITSELF)
        open_ = self.answering and not self.complete
        return bool(open_ and self.why and ends and end_of(self.media, self.why))

    async def unless_silent(self) -> None:
        """Return unless it is silent; then it is about to be cancelled here."""
        if self.silent:
            await asyncio.get_running_loop().create_future()

    def cut(self) -> None:
        """Record its end, and send the last piece."""
        if self.task.done() or self.why is None:
            return
        self._entry.details["error"] = type(self.why).__name__
        self._entry.end()
        piece = {"type": "http.response.body", "body": end_of(self.media, self.why), "more_body": False}
        self.last = asyncio.ensure_future(self._send(piece))  # type: ignore[arg-type]

    def check(self, cache: IdentityCache) -> None:
        """End it unless its sender still has the right to it. A request about the sender itself, such as one that
        revokes its own token, goes on until it answers; if the answer is a stream, the check is made up for then."""
        permission = self._state.get("permission")
        self.unchecked = not self.answering and bool(permission) and permission[0].startswith("self.")
        if self.unchecked:
            return
        authority = cache.again(self.authority)
        if authority is None:
            self.end(Unauthenticated("the proof of who you are is not valid any more", "make a new token"))
        elif permission:
            try:
                authority.check(*permission)
            except InsulaError as error:
                self.end(error)
            if permission[0].startswith("self.") and not authority.has_all_of(self.authority):
                self.end(Denied("a role of yours was taken", "ask again: the answer is another one now"))
            self.authority = authority  # which changes of roles concern it: those of its groups may be others now


class OpenRequests(set[OpenRequest]):
    """All that are open."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: list[OpenRequest] = []  # that are to be cut
        self._cutting: asyncio.Task[None] | None = None
        self._cancelling: set[asyncio.Task[None]] = set()

    def check(self, principal: str, cache: IdentityCache) -> None:
        """Check the requests of a principal whose rights have changed."""
        for request in tuple(self):
            sender = request.authority
            if sender.principal is not None and (sender.principal.id == principal or principal in sender.groups):
                request.check(cache)

    def end(self, request: OpenRequest) -> None:
        if not request.is_stream():
            request.task.cancel()
            return
        request.silent = True
        self._streams.append(request)
        if self._cutting is None or self._cutting.done():
            self._cutting = asyncio.get_running_loop().create_task(self._cut(), context=Context())

    async def _cut(self) -> None:
        while self._streams:
            streams, self._streams = self._streams, []
            try:
                for some in _in_turns(streams):
                    for request in some:
                        request.cut()
                    await asyncio.sleep(0)
            finally:
                cancelling = asyncio.get_running_loop().create_task(_cancel(streams))
                self._cancelling.add(cancelling)
                cancelling.add_done_callback(self._cancelling.discard)

    async def cut(self) -> None:
        """Return when no stream is to be cut, or after a moment."""
        if self._cutting is not None and not self._cutting.done():
            await asyncio.wait((self._cutting,), timeout=_PATIENCE)


async def _cancel(requests: Sequence[OpenRequest]) -> None:
    for some in _in_turns(requests):
        for request in some:
            request.task.cancel()
        await asyncio.sleep(0)


def _in_turns(requests: Sequence[OpenRequest]) -> Iterator[Sequence[OpenRequest]]:
    for start in range(0, len(requests), _TURN):
        yield requests[start : start + _TURN]
