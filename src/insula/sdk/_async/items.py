"""`AsyncItems`: a stream of the API, such as events, logs and archives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from insula.model.stream import Decoder
from insula.sdk._async.calls import AsyncCaller
from insula.sdk._async.network import finish
from insula.sdk._async.transport import AsyncExchange
from insula.sdk.decoding import frames, line
from insula.sdk.messages import HTTPRequest
from insula.sdk.types import STREAMS, LogOutput

T = TypeVar("T")


class AsyncItems(Generic[T]):
    """The items of a stream, as they arrive. The request is sent at the start of the `with` block, or else for the
    first item.

    At the end of the block, of the items, or after an error, the connection is closed. A stream that ends because a
    right was taken raises the reason: Unauthenticated, Denied or NotFound.
    """

    def __init__(
        self,
        caller: AsyncCaller,
        request: HTTPRequest,
        read: Callable[[AsyncIterator[bytes]], AsyncIterator[T]],
    ) -> None:
        self._caller = caller
        self._request = request
        self._read = read
        self._exchange: AsyncExchange | None = None
        self._items: AsyncIterator[T] | None = None
        self._closed = False

    async def __aenter__(self) -> AsyncItems[T]:
        await self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncItems[T]:
        return self

    async def __anext__(self) -> T:
        if self._closed:
            raise StopAsyncIteration
        try:
            return await anext(await self._begin())
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close the connection."""
        self._closed = True
        if self._exchange is not None:
            await self._exchange.aclose()
        if self._items is not None:
            await finish(self._items)

    async def _begin(self) -> AsyncIterator[T]:
        if self._items is None:
            self._exchange = await self._caller.open(self._request)
            self._items = self._read(pieces(self._exchange))
        return self._items


async def pieces(exchange: AsyncExchange) -> AsyncIterator[bytes]:
    """Yield the body of a response in pieces."""
    while piece := await exchange.receive():
        yield piece


def lines(convert: Callable[[object], T]) -> Callable[[AsyncIterator[bytes]], AsyncIterator[T]]:
    """Return what makes objects of lines of JSON; one that is a problem is raised."""

    async def read(body: AsyncIterator[bytes]) -> AsyncIterator[T]:
        rest = b""
        async for piece in body:
            *whole, rest = (rest + piece).split(b"\n")
            for each in whole:
                if each:
                    yield convert(line(each))
        if rest:
            yield convert(line(rest))

    return read


async def log_outputs(body: AsyncIterator[bytes]) -> AsyncIterator[LogOutput]:
    """Yield the frames of a log."""
    decoder = Decoder()
    async for piece in body:
        for kind, payload in frames(decoder, piece):
            if kind in STREAMS:
                written = int.from_bytes(payload[:8], "big") / 1e9
                yield LogOutput(time=written, stream=STREAMS[kind], data=payload[8:])


async def as_sent(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces of an archive as they are."""
    async for piece in body:
        yield piece
