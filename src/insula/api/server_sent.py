"""Server-sent events (HTML, 9.2): what a browser's EventSource reads, beside JSON lines and frames.

An item is one event: `data` is its JSON, `id` the cursor to resume after it. An error is an event of the type `error`,
as the last one. A comment is sent when there was nothing for a while, so that no proxy ends the connection.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from litestar import Request
from litestar.response import Stream

from insula.api.narrowing import for_sender
from insula.api.streams import EVENTS, json_lines, last_piece
from insula.control.identities.authority import Authority
from insula.model.stream import Decoder, Kind

LAST_EVENT_ID = "last-event-id"
QUIET = 15.0
"""Seconds without an event after which a comment is sent."""
_STREAMS = {Kind.STDOUT: "stdout", Kind.STDERR: "stderr"}


def wanted(request: Request[Any, Any, Any]) -> bool:
    """Whether the client asks for server-sent events."""
    return EVENTS in request.headers.get("accept", "")


def lines_or_events(request: Request[Any, Any, Any], items: AsyncIterator[Any], authority: Authority) -> Stream:
    """Send items in the form that the client asks for: JSON lines, or server-sent events."""
    return server_sent(items, authority) if wanted(request) else json_lines(items, authority)


def server_sent(items: AsyncIterator[Any], authority: Authority) -> Stream:
    """Encode what the sender may see of each item as one event, as soon as it arrives."""

    async def events() -> AsyncIterator[bytes]:
        try:
            async for item in _kept_alive(items):
                if item is None:
                    yield b":\n\n"
                    continue
                mark = item.get("cursor") if isinstance(item, dict) else None
                head = f"id: {mark}\n".encode() if mark else b""
                yield head + b"data: " + msgspec.json.encode(for_sender(item, authority)) + b"\n\n"
        except Exception as error:
            yield last_piece(EVENTS, error)

    return Stream(events(), media_type=EVENTS, headers={"cache-control": "no-store"})


async def output(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Yield the frames of a log as {time, stream, data}; data that is not UTF-8 is in base64, as `base64`."""
    decoder = Decoder()
    async for piece in pieces:
        for kind, payload in decoder.feed(piece):
            shown: dict[str, Any] = {
                "time": int.from_bytes(payload[:8], "big") / 1e9,
                "stream": _STREAMS.get(kind, kind.name),
            }
            try:
                yield {**shown, "data": payload[8:].decode()}
            except UnicodeDecodeError:
                yield {**shown, "base64": b64encode(payload[8:]).decode()}


async def _kept_alive(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield the items, and None after each quiet time."""
    waiting: asyncio.Future[Any] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(items))
            done, _ = await asyncio.wait((waiting,), timeout=QUIET)
            if not done:
                yield None
                continue
            found, waiting = waiting, None
            try:
                item = found.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
