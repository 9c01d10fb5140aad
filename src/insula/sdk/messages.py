"""What a transport carries: the head of a request and of its response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from insula.model.errors import Invalid, Unavailable

Query = Mapping[str, object] | None
"""The parameters of a request; those that are None are left out."""


class ConnectionLost(Unavailable):
    """The connection ended before the answer. A request that changes something may have been carried out."""


class HTTPRequest(NamedTuple):
    """A request. `target` is path and query, `fields` are header fields, whose names are in lower case. `body` is None
    if it is sent in pieces, by `Exchange.send`, until `Exchange.end`."""

    method: str
    target: str
    fields: tuple[tuple[str, str], ...] = ()
    body: bytes | None = b""

    def __repr__(self) -> str:
        return f"HTTPRequest({self.method} {self.target})"  # the fields have the token

    def with_field(self, name: str, value: str) -> HTTPRequest:
        """Return the request with one more header field. Invalid if the value is not printable ASCII."""
        if not (value.isascii() and value.isprintable()):
            raise Invalid(f"the value of the header field {name} is not printable ASCII", "use another one")
        return self._replace(fields=(*self.fields, (name, value)))

    def field(self, name: str) -> str | None:
        return next((value for each, value in self.fields if each == name), None)


class HTTPHead(NamedTuple):
    """The status of a response and its header fields, whose names are in lower case."""

    status: int
    fields: dict[str, str]


def encoded(request: HTTPRequest) -> bytes:
    """Return a request as HTTP/1.1 (RFC 9112): the head, and the body if it is known."""
    framing = "transfer-encoding: chunked" if request.body is None else f"content-length: {len(request.body)}"
    fields = (f"{name}: {value}" for name, value in request.fields)
    lines = (f"{request.method} {request.target} HTTP/1.1", "host: insula", framing, *fields, "", "")
    return "\r\n".join(lines).encode("ascii") + (request.body or b"")


def next_page(link: str | None) -> str | None:
    """Return the target of the next page from the field Link (RFC 8288); None if this page is the last."""
    where, _, relation = (link or "").partition(">;")
    usable = where.startswith("</v1/") and where.isascii() and where.isprintable() and " " not in where
    return where[1:] if usable and relation.strip() == 'rel="next"' else None
