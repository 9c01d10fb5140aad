"""Attach and exec: frames to a process in the request body, and its output in the response body, at the same time.

HTTP/1.1 allows a response before the end of the request (RFC 9112, 9.3), and ASGI concurrent `receive` and `send`. Both
directions have back-pressure: more of the request is read only after the process has taken the previous frames, and
uvicorn's `send` waits while the client doesn't read. A client that disconnects has detached: the process of an attach
keeps running.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

import msgspec
from litestar import Request
from litestar.types import Receive, Scope, Send

from insula.api.open_requests import ENDS_ITSELF
from insula.api.patience import BODY
from insula.api.streams import FRAMES, last_piece
from insula.model.errors import Conflict, InsulaError, Invalid, NotFound, Unavailable
from insula.model.stream import Decoder, Kind, encode

T = TypeVar("T")
TOWARDS = (Kind.STDIN, Kind.STDIN_EOF, Kind.RESIZE)
_TURN, _SMALL, _PAUSE = 64, 1024, 0.004
"""After so many frames of fewer bytes a connection waits for so many seconds, and others have their turn: a client may
send ten thousand empty ones at once, again and again."""


class Attached(Protocol):
    """A process's streams, as returned by the runtime."""

    def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]: ...

    async def send(self, kind: Kind, payload: bytes = b"") -> None: ...


class Incoming:
    """The frames in a request's body, in order."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._decoder = Decoder()
        self._frames: deque[tuple[Kind, bytes]] = deque()
        self._small = 0
        self.ended = False
        self.gone = False

    async def next(self) -> tuple[Kind, bytes] | None:
        """Return the next frame; None after the last, or if the client has disconnected. Invalid if it is malformed."""
        while not self._frames and not self.ended and not self.gone:
            message = await self._receive()
            if message["type"] != "http.request":
                self.gone = True
                break
            self.ended = not message["more_body"]
            try:
                self._frames.extend(self._decoder.feed(message["body"]))
            except ValueError as error:
                raise Invalid(f"the body is not a sequence of frames: {error}", "see /openapi.json") from None
        if not self._frames:
            return None
        frame = self._frames.popleft()
        self._small += len(frame[1]) < _SMALL
        if self._small >= _TURN:
            self._small = 0
            await asyncio.sleep(_PAUSE)
        return frame

    async def until_gone(self) -> None:
        """Wait until the client closes the connection."""
        while not self.gone:
            message = await self._receive()
            self.gone = message["type"] != "http.request"


async def opening(request: Request[Any, Any, Any], kind: type[T]) -> tuple[T, Incoming]:
    """Read the OPEN frame at the start of a body; returns its payload, which is JSON of this type, and the frames after
    it. Invalid."""
    incoming = Incoming(request.receive)
    try:
        async with asyncio.timeout(BODY):
            frame = await incoming.next()
    except TimeoutError:
        raise Invalid(f"the OPEN frame did not come within {BODY:g} s", "send it first") from None
    if frame is None or frame[0] is not Kind.OPEN:
        hint = f"begin with an OPEN frame whose payload is an {kind.__name__} as JSON"
        raise Invalid("the body does not begin with an OPEN frame", hint)
    try:
        return msgspec.json.decode(frame[1], type=kind), incoming
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"the OPEN frame has no valid {kind.__name__}: {error}", "see /openapi.json") from None


class Duplex:
    """An ASGI response that connects the client to a process.

    `open` attaches (its errors still get an HTTP status), `begin` runs once the client has its response head,
    `signal` sends a signal to the process. `headers` are more fields of that head. `owned`: the process belongs to this
    request, as that of an exec does, and is killed when its sender loses the right to it.
    """

    def __init__(
        self,
        open: Callable[[], AbstractAsyncContextManager[Attached]],  # noqa: A002
        *,
        signal: Callable[[int], Awaitable[None]],
        begin: Callable[[], Awaitable[object]] | None = None,
        incoming: Incoming | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
        owned: bool = False,
    ) -> None:
        self.open = open
        self.signal = signal
        self.begin = begin
        self.incoming = incoming
        self.headers = headers
        self.owned = owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = self.incoming or Incoming(receive)
        scope["state"][ENDS_ITSELF] = True  # what it has started may have to be killed first
        async with self.open() as attached:
            headers = [(b"content-type", FRAMES.encode()), (b"connection", b"close"), *self.headers]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            last = await self._join(attached, incoming, send, scope["state"])
        if not incoming.gone:
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _join(self, attached: Attached, incoming: Incoming, send: Send, state: Any) -> bytes:
        """Pass frames until the process has ended or the client has disconnected; returns the last frame to send."""
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
            return await self._ended(state)
        except Exception as error:
            return last_piece(FRAMES, error)
        finally:
            for task in (down, up):
                task.cancel()
            await asyncio.gather(down, up, return_exceptions=True)

    async def _ended(self, state: Any) -> bytes:
        """The last frame, with the reason, of a request that the daemon has ended. If the sender has lost the right to
        the process that it had started, that is killed."""
        why = state.get("ended")
        if why is None or isinstance(why, Unavailable):
            return last_piece(
                FRAMES, Unavailable("insulad is stopping; the process keeps running", "attach again later")
            )
        if self.owned:
            with contextlib.suppress(InsulaError):
                await self.signal(signal.SIGKILL)
        return last_piece(FRAMES, why)

    async def _down(self, attached: Attached, send: Send) -> bytes:
        async for kind, payload in attached:
            await send({"type": "http.response.body", "body": encode(kind, payload), "more_body": True})
        return b""

    async def _up(self, attached: Attached, incoming: Incoming) -> None:
        """Pass frames to the process until the client disconnects, or sends a frame that is not allowed."""
        while (frame := await incoming.next()) is not None:
            kind, payload = frame
            if kind in TOWARDS:
                await attached.send(kind, payload)
            elif kind is Kind.SIGNAL and len(payload) == 1:
                with contextlib.suppress(
                    Conflict, NotFound
                ):  # it has just ended, which is reported in the other direction
                    await self.signal(payload[0])
            elif kind is not Kind.IDLE:
                raise Invalid(f"a frame of kind {kind.name} can't be sent to an instance", "see /openapi.json")
        await incoming.until_gone()
