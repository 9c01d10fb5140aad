"""Time limits for what clients send: heads and bodies of requests, and silence between requests.

A client that sends a byte now and then would hold a connection for ever (slowloris). So the head of a request must be
whole `HEAD` seconds after the connection was made, or after the answer before it: whatever arrives doesn't prolong
that. A body of JSON must be whole after `BODY` seconds. An upload must bring `LEAST` bytes in every `STALL` seconds. A
connection on which nothing happens is closed after the same `HEAD` seconds, or five after an answer (uvicorn's
timeout_keep_alive). Frames to a process, and answers, may take days.
"""

from __future__ import annotations

import asyncio
from typing import Any

from litestar.types import Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

from insula.model.errors import Invalid

HEAD = 10.0
"""Seconds for the head of a request."""
BODY = 30.0
"""Seconds for a body of JSON, and for the first frame of a body of frames."""
STALL, LEAST = 300.0, 64 << 10
"""An upload is at least so fast: (seconds, bytes in that time)."""


class PunctualProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which closes connections whose next head does not come in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Set the deadline if no request is being answered, and clear it otherwise."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(HEAD, self.transport.close)


class Patient:
    """The `receive` of a request, which raises Invalid if the body takes longer than `BODY` seconds. There is no limit
    for routes that take their bodies as they come: their `state` has "streams_body"."""

    def __init__(self, receive: Receive, state: Any) -> None:
        self._receive = receive
        self._state = state
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
        return message
