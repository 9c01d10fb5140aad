"""JSON responses of any size: a large one is encoded and sent in pieces, so that it doesn't block other requests.

A tenant may have a thousand instances with a megabyte of arguments each, and an instance thousands of processes.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Request, Response
from litestar.response import Stream
from litestar.response.base import ASGIResponse

from insula.api.authorization import authority_of
from insula.api.narrowing import for_sender

PIECE = 1 << 17
"""The largest response in bytes that is sent as a whole, with Content-Length."""


class Answer(Response[Any]):
    """The result of a handler as JSON: as a whole if it is short, else in chunks (RFC 9112, 7.1)."""

    def to_asgi_response(self, app: Litestar | None, request: Request[Any, Any, Any], **options: Any) -> ASGIResponse:
        """Return the response for Litestar; `options` are those of `Response.to_asgi_response`."""
        if request is not None:
            self.content = for_sender(self.content, authority_of(request.scope))
            if link := request.scope["state"].get("link"):
                self.headers["link"] = link  # the next page (RFC 8288)
        if isinstance(self.content, (list, tuple, msgspec.Struct)):
            pieces = in_pieces(parts(self.content))
            first = next(pieces)
            if len(first) > PIECE:
                large = Stream(
                    in_turns(first, pieces),
                    media_type=MediaType.JSON,
                    status_code=self.status_code,
                    headers=self.headers,
                )
                return large.to_asgi_response(app, request, **options)
            self.content = first
        return super().to_asgi_response(app, request, **options)


def parts(value: Any) -> Iterator[bytes]:
    """Yield JSON in parts: the items of a list, or the fields of an object with the items of its lists."""
    if isinstance(value, msgspec.Struct):
        yield b"{"
        for number, (name, key) in enumerate(_fields(type(value))):
            yield b"," * (number > 0) + key
            found = getattr(value, name)
            if isinstance(found, list):
                yield from parts(found)
            else:
                yield msgspec.json.encode(found)
        yield b"}"
        return
    yield b"["
    for number, item in enumerate(value):
        yield b"," * (number > 0) + msgspec.json.encode(item)
    yield b"]"


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> Sequence[tuple[str, bytes]]:
    """Return the name of each field with its key in JSON; msgspec looks at the annotations each time."""
    fields = msgspec.structs.fields(kind)
    return [(field.name, msgspec.json.encode(field.encode_name) + b":") for field in fields]


def in_pieces(encoded: Iterator[bytes]) -> Iterator[bytes]:
    """Join parts to pieces, all but the last longer than `PIECE`."""
    piece = bytearray()
    for part in encoded:
        piece += part
        if len(piece) > PIECE:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


async def in_turns(first: bytes, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yield `first` and the pieces after it, each encoded after the one before was sent."""
    yield first
    for piece in pieces:
        await asyncio.sleep(0)
        if piece:
            yield piece
