"""`Caller`: requests of the API, and their answers as objects or errors.

A request that changes nothing, or that has an idempotency key, is sent again if its connection is lost before the
answer. Keys are not made by themselves: a principal has 500 of them a day, and a program may make more changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from insula.client.http import MAX_ERROR_BODY, error_of, target
from insula.model.errors import Conflict
from insula.sdk._sync.network import Pieces, in_thread, pause, pieces_of
from insula.sdk._sync.transport import Exchange, Transport
from insula.sdk.decoding import parsed
from insula.sdk.messages import ConnectionLost, HTTPRequest, Query, next_page

T = TypeVar("T")
KEY = "idempotency-key"
_TRIES = 5  # of a request that may be sent again
_PAGE = 500


class Caller:
    """Sends requests by a transport, with a token if there is one; a function is asked for it at each request."""

    def __init__(self, transport: Transport, token: str | Callable[[], str] | None) -> None:
        self.transport = transport
        self._token = token

    def get(self, convert: Callable[[object], T], *path: str, query: Query = None) -> T:
        """Send GET, and return the answer."""
        return convert(parsed(self._whole(request("GET", *path, query=query))))

    def change(
        self,
        convert: Callable[[object], T],
        method: str,
        *path: str,
        key: str | None,
        body: object = None,
        query: Query = None,
    ) -> T:
        """Send a request that changes something, and return the answer. `key` is its idempotency key."""
        return convert(parsed(self._whole(request(method, *path, body=body, query=query), key)))

    def do(self, method: str, *path: str, key: str | None, body: object = None, query: Query = None) -> None:
        """Send a request that changes something, and has an empty answer."""
        self._whole(request(method, *path, body=body, query=query), key)

    def text(self, where: str) -> str:
        """Send GET for a target outside of /v1 or in it, and return the answer as text."""
        return (self._whole(HTTPRequest("GET", where))).decode()

    def read(self, *path: str) -> bytes:
        """Send GET, and return the answer as it is."""
        return self._whole(request("GET", *path))

    def upload(self, convert: Callable[[object], T], method: str, *path: str, pieces: Pieces, query: Query) -> T:
        """Send a request whose body is an archive in pieces, and return the answer."""
        sent = request(method, *path, query=query).with_field("content-type", "application/x-tar")
        exchange = self.transport.open(self._signed(sent._replace(body=None)))
        try:
            items = pieces_of(pieces)
            for piece in items:
                if not exchange.send(piece):  # refused already
                    break
            else:
                exchange.end()
            return convert(parsed(_body(checked(exchange)) or b"null"))
        finally:
            exchange.close()

    def pages(
        self, convert: Callable[[object], Sequence[T]], *path: str, query: Query, page: int | None = None
    ) -> Iterator[T]:
        """Yield the items of a list, of which a request brings `page` at a time."""
        where: str | None = request("GET", *path, query={**(query or {}), "limit": page or _PAGE}).target
        while where is not None:
            exchange = self._answered(HTTPRequest("GET", where))
            try:
                items = convert(parsed(_body(exchange)))
                where = next_page((exchange.head()).fields.get("link"))
            finally:
                exchange.close()
            yield from items

    def open(self, sent: HTTPRequest) -> Exchange:
        """Send a request whose response the caller reads as it arrives, and closes."""
        return checked(self.transport.open(self._signed(sent)))

    def begin(self, sent: HTTPRequest) -> Exchange:
        """Begin a request whose body the caller sends before the response is looked at."""
        return self.transport.open(self._signed(sent))

    def _whole(self, sent: HTTPRequest, key: str | None = None) -> bytes:
        """Send a request, again if it may be, and return the body of its response."""
        if key is not None:
            sent = sent.with_field(KEY, key)
        exchange = self._answered(sent)
        try:
            return _body(exchange)
        finally:
            exchange.close()

    def _answered(self, sent: HTTPRequest) -> Exchange:
        """Send a request, again if its connection is lost and it may be; returns its response, which is a success."""
        again = sent.method == "GET" or sent.field(KEY) is not None
        lost: ConnectionLost | None = None
        for _ in range(_TRIES if again else 1):
            try:
                return self.open(sent)
            except ConnectionLost as error:
                lost = error
            except Conflict as error:
                if lost is None or error.retry_after is None:
                    raise
                pause(error.retry_after)  # the first one still runs
        raise lost or ConnectionLost("insulad has not answered", "try again")

    def _signed(self, sent: HTTPRequest) -> HTTPRequest:
        if self._token is None:
            return sent
        token = self._token if isinstance(self._token, str) else in_thread(self._token)
        return sent.with_field("authorization", f"Bearer {token}")


def request(method: str, *path: str, body: object = None, query: Query = None) -> HTTPRequest:
    """Return a request below /v1, with `body` as JSON."""
    where = target(*path, **(query or {}))
    if body is None:
        return HTTPRequest(method, where)
    return HTTPRequest(method, where, (("content-type", "application/json"),), msgspec.json.encode(body))


def checked(exchange: Exchange) -> Exchange:
    """Return an exchange whose response is a success; otherwise close it, and raise the error of the server."""
    try:
        head = exchange.head()
        if head.status < 400:
            return exchange
        error = error_of(head.status, (_body(exchange, MAX_ERROR_BODY))[:MAX_ERROR_BODY])
        after = head.fields.get("retry-after", "")
        if after.isascii() and after.isdigit():
            error.retry_after = float(after)
        raise error
    except BaseException:
        exchange.close()
        raise


def _body(exchange: Exchange, most: int | None = None) -> bytes:
    """Return the body of a response; with `most`, what has arrived when it is as long as that."""
    body = bytearray()
    while (most is None or len(body) < most) and (piece := exchange.receive()):
        body += piece
    return bytes(body)
