"""Attach and exec: frames towards a process in the request body while its output flows in the response body.

HTTP/1.1 allows a response before the request has ended (RFC 9112, 9.3), and ASGI calls to `receive` and `send` at once.
Both directions have back-pressure: we ask for more of the request only once the process's side has taken what
came, and uvicorn's `send` waits while the client doesn't read. When the client goes, it has detached: the process
of an attach keeps running.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from litestar import Request
from litestar.types import Receive, Scope, Send

from insula.api.streams import FRAMES, error_frame
from insula.model.errors import Conflict, Invalid, NotFound, Unavailable
from insula.model.stream import Decoder, Kind, encode

TOWARDS = (Kind.STDIN, Kind.STDIN_EOF, Kind.RESIZE)


class Attached(Protocol):
    """A process's streams, as the runtime gives them."""

    def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]: ...

    async def send(self, kind: Kind, payload: bytes = b"") -> None: ...


class Incoming:
    """The frames in a request's body, in order; each is given once."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._decoder = Decoder()
        self._frames: list[tuple[Kind, bytes]] = []
        self.ended = False
        self.gone = False

    async def next(self) -> tuple[Kind, bytes] | None:
        """The next frame; None after the last, or when the client has gone. Raises Invalid on what is no frame."""
        while not self._frames and not self.ended and not self.gone:
            message = await self._receive()
            if message["type"] != "http.request":
                self.gone = True
                break
            self.ended = not message["more_body"]
            try:
                self._frames.extend(self._decoder.feed(message["body"]))
            except ValueError as error:
                raise Invalid(f"the body is no sequence of frames: {error}", "see /openapi.json") from None
        return self._frames.pop(0) if self._frames else None

    async def until_gone(self) -> None:
        """Returns when the client closes the connection."""
        while not self.gone:
            message = await self._receive()
            self.gone = message["type"] != "http.request"


async def opening(request: Request[Any, Any, Any]) -> tuple[bytes, Incoming]:
    """The payload of the OPEN frame that an exec's body begins with, and the frames after it."""
    incoming = Incoming(request.receive)
    frame = await incoming.next()
    if frame is None or frame[0] is not Kind.OPEN:
        raise Invalid("the body does not begin with an OPEN frame", "put what to execute into it, as JSON")
    return frame[1], incoming


class Duplex:
    """An ASGI response that joins the client to a process.

    `open` attaches (its errors still get an HTTP status), `begin` runs once the client has its response head,
    `signal` sends a signal to the process.
    """

    def __init__(
        self,
        open: Callable[[], AbstractAsyncContextManager[Attached]],  # noqa: A002
        *,
        signal: Callable[[int], Awaitable[None]],
        begin: Callable[[], Awaitable[object]] | None = None,
        incoming: Incoming | None = None,
    ) -> None:
        self.open = open
        self.signal = signal
        self.begin = begin
        self.incoming = incoming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = self.incoming or Incoming(receive)
        async with self.open() as attached:
            headers = [(b"content-type", FRAMES.encode()), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            last = await self._join(attached, incoming, send)
        if not incoming.gone:
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _join(self, attached: Attached, incoming: Incoming, send: Send) -> bytes:
        """Moves frames until the process has ended or the client has gone; what remains to be sent."""
        down = asyncio.ensure_future(self._down(attached, send))
        up = asyncio.ensure_future(self._up(attached, incoming))
        try:
            if self.begin is not None:
                await self.begin()
            await asyncio.wait((down, up), return_when=asyncio.FIRST_COMPLETED)
            if up.done() and not down.done() and not incoming.gone:
                up.result()
                await down
            return b"" if incoming.gone else down.result()
        except asyncio.CancelledError:
            return error_frame(Unavailable("insulad is stopping; the process keeps running", "attach again later"))
        except Exception as error:
            return error_frame(error)
        finally:
            for task in (down, up):
                task.cancel()
            await asyncio.gather(down, up, return_exceptions=True)

    async def _down(self, attached: Attached, send: Send) -> bytes:
        async for kind, payload in attached:
            await send({"type": "http.response.body", "body": encode(kind, payload), "more_body": True})
        return b""

    async def _up(self, attached: Attached, incoming: Incoming) -> None:
        """Ends only when the client has gone, or sent what it may not."""
        while (frame := await incoming.next()) is not None:
            kind, payload = frame
            if kind in TOWARDS:
                await attached.send(kind, payload)
            elif kind is Kind.SIGNAL and len(payload) == 1:
                with contextlib.suppress(Conflict, NotFound):  # it has just ended: that is told in the other direction
                    await self.signal(payload[0])
            elif kind is not Kind.IDLE:
                raise Invalid(f"a frame of kind {kind.name} does not go towards an instance", "see /openapi.json")
        await incoming.until_gone()
