"""`ASGITransport`: an ASGI application in this process as the server, for tests without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from urllib.parse import unquote

from insula.sdk.messages import ConnectionLost, HTTPHead, HTTPRequest

ASGIMessage = MutableMapping[str, object]
Application = Callable[..., Awaitable[None]]
"""An application: frameworks write down the types of its three arguments in different ways."""


class ASGITransport:
    """Calls an application (ASGI 3.0) for each request, in a task of its own. `state` is given to it with each."""

    def __init__(self, app: Application, state: MutableMapping[str, object] | None = None) -> None:
        self._app = app
        self._state = state or {}

    async def open(self, request: HTTPRequest) -> ASGIExchange:
        """Begin to answer a request."""
        return ASGIExchange(self._app, request, self._state)

    async def aclose(self) -> None:
        """Nothing is kept open."""


class ASGIExchange:
    """One call of an application. At most one piece of each body is kept."""

    def __init__(self, app: Application, request: HTTPRequest, state: MutableMapping[str, object]) -> None:
        self._body: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self._answer: asyncio.Queue[ASGIMessage] = asyncio.Queue(1)
        self._given = request.body
        self._head: HTTPHead | None = None
        self._ended = self._over = False
        self._gone = asyncio.Event()
        path, _, query = request.target.partition("?")
        fields = [(name.encode("ascii"), value.encode("ascii")) for name, value in request.fields]
        scope: ASGIMessage = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode("ascii"),
            "query_string": query.encode("ascii"),
            "root_path": "",
            "headers": [(b"host", b"insula"), *fields],
            "state": dict(state),
        }
        self._task = asyncio.ensure_future(app(scope, self._receive, self._answer.put))

    async def _receive(self) -> ASGIMessage:
        """What the application gets: the body, then the end of the connection."""
        if self._given is not None:
            data, self._given = self._given, b""
            if not self._ended:
                self._ended = True
                return {"type": "http.request", "body": data, "more_body": False}
        if not self._ended:
            piece = await self._body.get()
            self._ended = piece is None
            return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, data: bytes) -> bool:
        return await self._give(data)

    async def end(self) -> None:
        await self._give(None)

    async def _give(self, piece: bytes | None) -> bool:
        """Pass a piece on; False if the application has ended before."""
        putting = asyncio.ensure_future(self._body.put(piece))
        try:
            await asyncio.wait((putting, self._task), return_when=asyncio.FIRST_COMPLETED)
            return putting.done()
        finally:
            putting.cancel()

    async def head(self) -> HTTPHead:
        if self._head is None:
            message = await self._next()
            status, fields = message["status"], message.get("headers") or ()
            assert isinstance(status, int) and isinstance(fields, list | tuple)
            self._head = HTTPHead(
                status, {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in fields}
            )
        return self._head

    async def receive(self) -> bytes:
        await self.head()
        while not self._over:
            message = await self._next()
            self._over = not message.get("more_body")
            body = message.get("body", b"")
            assert isinstance(body, bytes)
            if body:
                return body
        return b""

    async def _next(self) -> ASGIMessage:
        getting = asyncio.ensure_future(self._answer.get())
        try:
            await asyncio.wait((getting, self._task), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # the last message may have been put just before the end
            if getting.done():
                return getting.result()
            await self._task  # its error
            raise ConnectionLost("the application ended before the end of its answer", "see its log")
        finally:
            getting.cancel()

    async def aclose(self) -> None:
        self._gone.set()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
