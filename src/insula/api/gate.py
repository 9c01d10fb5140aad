"""Middleware: refuses clients that are not allowed, ends requests when the daemon stops, logs and audits requests."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any
from urllib.parse import quote

import msgspec
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from insula.api.audit import AuditedRequest
from insula.api.peer import GROUP, Peer, allowed, group_id
from insula.audit import AuditLog
from insula.model.errors import Denied, InsulaError, Unavailable

log = logging.getLogger("insula.access")
GRACE = 1.0
"""Seconds for requests to finish after the server was told to stop: followers of logs or events never finish."""
_HINT = f"be root or a member of the group `{GROUP}`"
_PATH = 200  # characters of a path in the log


class Gate:
    """The middleware. Clients that are not allowed get Denied before their request is parsed. Requests are ended
    `GRACE` seconds after the event "stopping" in the server's state."""

    def __init__(self, app: ASGIApp, audit: AuditLog | None = None, socket: str = "") -> None:
        self.app = app
        self.audit = audit
        self.socket = socket
        self.group = group_id()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state: dict[str, Any] = dict(scope["state"])
        peer = state.get("peer")
        if not isinstance(peer, Peer):
            await refuse(Denied("an unknown user may not use insulad", _HINT), send)
            return
        entry = AuditedRequest(self.audit, scope, peer, self.socket)
        if not allowed(peer, self.group):
            denied = Denied(f"user {peer.uid} may not use insulad", _HINT)
            entry.refused(denied)
            await refuse(denied, send)
            return
        started, status = False, 0
        begun = time.monotonic()

        async def noting_send(message: Message) -> None:
            nonlocal started, status
            started = True
            if message["type"] == "http.response.start" and self.audit:
                message["headers"] = [*message["headers"], (b"x-request-id", entry.id.encode())]
            status = message.get("status", status)  # type: ignore[assignment]
            entry.sending(message)
            await send(message)

        request = asyncio.ensure_future(self.app(scope, receive, noting_send))
        stopping = asyncio.ensure_future(state["stopping"].wait())
        try:
            await asyncio.wait((request, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                await asyncio.wait((request,), timeout=GRACE)
            if not request.done():
                request.cancel()
                await asyncio.wait((request,))
        except asyncio.CancelledError:
            request.cancel()
            raise
        finally:
            stopping.cancel()
            entry.write()  # the status of a request that was aborted
            if log.isEnabledFor(logging.DEBUG):
                took = (time.monotonic() - begun) * 1000
                path = quote(scope["path"], safe="/:@,+=~")[:_PATH]  # a newline in it would start a new log line
                who = f"uid={peer.uid} pid={peer.pid}"
                log.debug("%s %s %s status=%d ms=%.1f", scope.get("method"), path, who, status, took)
        if not request.cancelled():
            request.result()
        elif not started:
            await refuse(Unavailable("insulad is stopping", "try again later"), send)


async def refuse(error: InsulaError, send: Send) -> None:
    """Respond with an error, and close the connection."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    body = msgspec.json.encode(error.to_dict())
    await send({"type": "http.response.body", "body": body, "more_body": False})
