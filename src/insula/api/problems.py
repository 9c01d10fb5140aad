"""Errors as problem details, `application/problem+json` (RFC 9457), and the header fields that belong to them."""

from __future__ import annotations

import math

import msgspec
from litestar.types import Send

from insula.api.redaction import problem_of
from insula.model.errors import InsulaError, Unauthenticated

PROBLEM = "application/problem+json"


def fields_of(error: InsulaError) -> list[tuple[bytes, bytes]]:
    """Return the header fields that belong to an error."""
    fields = []
    if isinstance(error, Unauthenticated):
        fields.append((b"www-authenticate", b"Bearer"))
    if error.retry_after is not None:
        fields.append((b"retry-after", b"%d" % math.ceil(error.retry_after)))
    return fields


async def refuse(error: InsulaError, send: Send) -> None:
    """Respond with an error, and close the connection: for what no route has answered."""
    status, headers, body = encoded(error)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def encoded(error: InsulaError, status: int | None = None) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Return the status, the header fields and the body of a response after which the connection is closed. `status` is
    another one than the error's own."""
    body = msgspec.json.encode(problem_of(error, status))
    length = b"%d" % len(body)
    headers = [(b"content-type", PROBLEM.encode()), (b"connection", b"close"), (b"content-length", length)]
    return status or error.http_status, headers + fields_of(error), body
