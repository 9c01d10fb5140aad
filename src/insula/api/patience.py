"""Time limits for what clients send: heads and bodies of requests, and silence between requests.

A client that sends a byte now and then would hold a connection for ever (slowloris). So the head of a request must be
whole `HEAD` seconds after the connection was made, or after the answer before it: whatever arrives doesn't prolong
that. A body of JSON must be whole after `BODY` seconds. An upload must bring `LEAST` bytes in every `STALL` seconds. A
connection on which nothing happens is closed after the same `HEAD` seconds, or five after an answer (uvicorn's
timeout_keep_alive). Frames to a process, and streams, may take days. Of an answer that is complete a client must read
`LEAST` bytes in every `STALL` seconds. A sender has `MOST_BODIES` bytes of bodies in memory at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from litestar.types import Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

from insula.model.errors import Invalid, TooManyRequests

HEAD = 10.0
"""Seconds for the head of a request."""
BODY = 30.0
"""Seconds for a body of JSON, and for the first frame of a body of frames."""
STALL, LEAST = 300.0, 64 << 10
"""An upload is at least so fast, and so is the reader of an answer: (seconds, bytes in that time)."""
MOST_BODIES = 64 << 20
"""Bytes of bodies of JSON that one sender may have in memory: eight of the largest."""


class PunctualProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which closes connections whose next head does not come in time."""

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._deadline, self._unread):
            if timer is not None:
                timer.cancel()
        self._deadline = self._unread = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()
        if self.flow.write_paused or self.transport.is_closing():
            self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None and not self.transport.is_closing():
            self._unread.cancel()
            self._unread = None

    def _watch_reader(self) -> None:
        """Set the deadline for reading the rest of an answer, which is in memory."""
        if self._unread is None:
            self._unread = self.loop.call_later(STALL, self._check_reader, self._left())

    def _check_reader(self, before: int) -> None:
        self._unread = None
        if self._left() > before - LEAST:
            self.transport.abort()
        else:
            self._watch_reader()

    def _left(self) -> int:
        return self.transport.get_write_buffer_size()

    def _close(self) -> None:
        self.transport.close()
        self._watch_reader()

    def _watch(self) -> None:
        """Set the deadline if no request is being answered, and clear it otherwise."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(HEAD, self._close)


class Patient:
    """The `receive` of a request, which raises Invalid if the body takes longer than `BODY` seconds, TooManyRequests if
    its sender has too much in memory; `close` when the request has ended. There is no limit for routes that take their
    bodies as they come: their `state` has "streams_body". `held` counts bytes by sender; None is not counted."""

    def __init__(self, receive: Receive, state: Any, held: Counter[str], sender: str | None) -> None:
        self._receive = receive
        self._state = state
        self._held = held
        self._sender = sender
        self._size = 0
        self._whole = False
        self._until: float | None = None

    async def __call__(self) -> Any:
        if self._whole or self._state.get("streams_body"):
            return await self._receive()
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + BODY
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise Invalid(f"the request's body did not come within {BODY:g} s", "send it faster") from None
        self._whole = message["type"] != "http.request" or not message["more_body"]
        if self._sender is not None and message["type"] == "http.request" and not (self._whole and not self._size):
            self._take(self._sender, len(message["body"]))
        return message

    def _take(self, sender: str, size: int) -> None:
        if self._held[sender] + size > MOST_BODIES:
            raise TooManyRequests(
                f"you have sent {MOST_BODIES >> 20} MiB that are not answered yet", "send less at once"
            )
        self._held[sender] += size
        self._size += size

    def close(self) -> None:
        """Count its body no more."""
        if self._sender is not None and self._size:
            self._held[self._sender] -= self._size
            self._size = 0
            if not self._held[self._sender]:
                del self._held[self._sender]
