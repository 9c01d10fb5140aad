"""The field Idempotency-Key of requests that change something (control/idempotency.py).

`begin` runs after the check of permissions and before the handler, so that nobody is told an answer that he might not
get. The middleware keeps the answer back until it is stored with the key.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from insula.api.authorization import authority_of
from insula.api.recovery import recovered
from insula.control import carried
from insula.control.idempotency import Attempt
from insula.control.identities.authority import Authority
from insula.control.plane import ControlPlane
from insula.model.errors import Conflict, Invalid
from insula.model.objects import IdempotencyRecord
from insula.store.protocol import Write
from insula.store.typed import Found

FIELD = b"idempotency-key"
REPLAYED = "idempotency-replayed"
MAX_KEY = 255
_CHANGES = ("POST", "PUT", "PATCH", "DELETE")


def takes_key(handler: Any, method: str) -> bool:
    """Whether a route takes a key: it changes something, and neither its body nor its answer is a stream."""
    streams = handler.opt.get("takes") or handler.opt.get("sends")
    return method in _CHANGES and not streams and handler.opt.get("repeatable") is not True


async def begin(request: Request[Any, Any, Any]) -> Response[Any] | None:
    """Return the earlier answer to a request that is sent again; None if the handler is to run (before_request)."""
    if not (given := _given(request.scope)):
        return None
    handler: Any = request.route_handler
    if not takes_key(handler, request.scope["method"]):
        raise Invalid("this request takes no Idempotency-Key", "leave it out: see /openapi.json")
    key = _parsed(given)
    sender = authority_of(request.scope)
    plane: ControlPlane = request.app.state.plane
    fingerprint = _fingerprint(request, sender, await request.body())
    found = await plane.idempotency_keys.begin(sender.principal.id if sender.principal else None, key, fingerprint)
    if isinstance(found, Attempt):
        request.scope["state"]["attempt"] = found
        carried.current.set(_Both(carried.current.get(), found))
        return None
    request.scope["state"]["replayed"] = True
    return await _replayed(request, plane, handler, found)


async def _replayed(
    request: Request[Any, Any, Any], plane: ControlPlane, handler: Any, found: Found[IdempotencyRecord]
) -> Response[Any]:
    record = found.value
    if handler.opt.get("secret"):
        what = f"it made {record.made}" if record.made else "it may have made something"
        raise Conflict(
            f"this request was carried out, and its answer is not kept, because it has a secret: {what}",
            "revoke that, and make another with a new key",
        )
    if record.status is not None and record.body is not None:
        return Response(record.body, status_code=record.status, media_type=record.media_type or None)
    return await recovered(request, plane, handler, found.revision)


class _Both:
    """What a transaction carries for the audit log, if anything, and for the key."""

    def __init__(self, first: carried.Carried | None, second: carried.Carried) -> None:
        self._all = (first, second) if first else (second,)

    def writes(self) -> list[Write]:
        return [write for each in self._all for write in each.writes()]

    def committed(self) -> None:
        for each in self._all:
            each.committed()


def _given(scope: Any) -> list[bytes]:
    """The fields with a key of a request that changes something. Reads are answered without a look at them."""
    return [value for name, value in scope["headers"] if name == FIELD] if scope["method"] in _CHANGES else []


def _parsed(given: list[bytes]) -> str:
    """The key: a string of RFC 8941, in quotes, or the bare text that many clients send. Invalid."""
    text = given[0].decode("latin-1").strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    if len(given) > 1 or not 1 <= len(text) <= MAX_KEY or not (text.isascii() and text.isprintable()) or '"' in text:
        raise Invalid("this is no idempotency key", f"send one, of 1 to {MAX_KEY} printable ASCII characters")
    return text


def _fingerprint(request: Request[Any, Any, Any], sender: Authority, body: bytes) -> str:
    """The digest of a request, with the rights that its answer depends on."""
    scope = request.scope
    tenant = scope["path_params"].get("tenant")
    rights = [sorted(sender.labels.items()), sender.sees_host, sender.sees_environment(tenant)]
    head = msgspec.json.encode([scope["method"], scope["path"], scope["query_string"].decode("latin-1"), rights])
    return hashlib.sha256(head + b"\n" + body).hexdigest()


class IdempotencyMiddleware:
    """Keeps the answer to a request with a key back until it is stored. Others, and their streams, pass through."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _given(scope):
            await self.app(scope, receive, send)
            return
        state: Any = scope["state"]
        held: list[Any] = []

        async def keeping_send(message: Message) -> None:
            attempt: Attempt | None = state.get("attempt")
            if state.get("replayed") and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REPLAYED.encode(), b"true")]
            if attempt is None:
                await send(message)
                return
            held.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await _keep(attempt, scope, held)
                for each in held:
                    await send(each)
                held.clear()

        try:
            await self.app(scope, receive, keeping_send)
        finally:
            if attempt := state.get("attempt"):
                attempt.close()


async def _keep(attempt: Attempt, scope: Any, held: list[Any]) -> None:
    start, *parts = held
    body = b"".join(part.get("body", b"") for part in parts)
    media_type = dict(start["headers"]).get(b"content-type", b"").decode("latin-1")
    if start["status"] < 400 and scope["route_handler"].opt.get("secret"):
        answer = msgspec.json.decode(body)
        made = answer.get("id") or answer.get("serial")
        await attempt.answered(start["status"], media_type, None, made)
        return
    await attempt.answered(start["status"], media_type, body)
