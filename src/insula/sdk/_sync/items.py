"""`Items`: a stream of the API, such as events, logs and archives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from insula.model.stream import Decoder
from insula.sdk._sync.calls import Caller
from insula.sdk._sync.network import finish
from insula.sdk._sync.transport import Exchange
from insula.sdk.decoding import frames, line
from insula.sdk.messages import HTTPRequest
from insula.sdk.types import STREAMS, LogOutput

T = TypeVar("T")


class Items(Generic[T]):
    """The items of a stream, as they arrive. The request is sent at the start of the `with` block, or else for the
    first item.

    At the end of the block, of the items, or after an error, the connection is closed. A stream that ends because a
    right was taken raises the reason: Unauthenticated, Denied or NotFound.
    """

    def __init__(
        self,
        caller: Caller,
        request: HTTPRequest,
        read: Callable[[Iterator[bytes]], Iterator[T]],
    ) -> None:
        self._caller = caller
        self._request = request
        self._read = read
        self._exchange: Exchange | None = None
        self._items: Iterator[T] | None = None
        self._closed = False

    def __enter__(self) -> Items[T]:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Items[T]:
        return self

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        try:
            return next(self._begin())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        if self._exchange is not None:
            self._exchange.close()
        if self._items is not None:
            finish(self._items)

    def _begin(self) -> Iterator[T]:
        if self._items is None:
            self._exchange = self._caller.open(self._request)
            self._items = self._read(pieces(self._exchange))
        return self._items


def pieces(exchange: Exchange) -> Iterator[bytes]:
    """Yield the body of a response in pieces."""
    while piece := exchange.receive():
        yield piece


def lines(convert: Callable[[object], T]) -> Callable[[Iterator[bytes]], Iterator[T]]:
    """Return what makes objects of lines of JSON; one that is a problem is raised."""

    def read(body: Iterator[bytes]) -> Iterator[T]:
        rest = b""
        for piece in body:
            *whole, rest = (rest + piece).split(b"\n")
            for each in whole:
                if each:
                    yield convert(line(each))
        if rest:
            yield convert(line(rest))

    return read


def log_outputs(body: Iterator[bytes]) -> Iterator[LogOutput]:
    """Yield the frames of a log."""
    decoder = Decoder()
    for piece in body:
        for kind, payload in frames(decoder, piece):
            if kind in STREAMS:
                written = int.from_bytes(payload[:8], "big") / 1e9
                yield LogOutput(time=written, stream=STREAMS[kind], data=payload[8:])


def as_sent(body: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the pieces of an archive as they are."""
    yield from body
