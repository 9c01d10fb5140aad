"""The hosts of requests in a stream of HTTP/1.1 (RFC 9112), each of them.

A connection may have many requests, and each names its host. So requests are parsed one after the other, with their
bodies, and every byte is held back until the host of its request is known. What two parsers could take differently is
refused: other line ends, folded lines, two hosts, two lengths, a transfer coding other than "chunked". So are
connections that become something else (CONNECT, Upgrade), because what follows can't be judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

LONGEST_HEAD: Final = 1 << 15  # bytes
_LONGEST_LINE: Final = 1 << 12  # of a chunk's size and of a trailer
_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST: Final = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/1\.([01])" % _TOKEN)
_FIELD: Final = re.compile(rb"(%b):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*" % _TOKEN)
_ABSOLUTE: Final = re.compile(rb"http://([^/?#]+)(?:[/?#].*)?", re.IGNORECASE)
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\x20-\x7e\x80-\xff\t]*)?")
_HOST: Final = re.compile(rb"([A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


class BadRequest(ValueError):
    """A request is malformed, ambiguous, or of a kind that can't be checked."""


class RequestBegins(NamedTuple):
    """A request begins, for this host and port (80 if it names none): bytes that follow belong to it."""

    host: str
    port: int


class RequestReader:
    """Reads requests piece by piece."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._state = self._head

    def feed(self, data: bytes) -> Iterator[RequestBegins | bytes]:
        """Add bytes. Yields a checkpoint before each request, and the bytes that may be sent once it has passed.

        BadRequest.
        """
        self._data += data
        while self._data:
            progress = False
            for each in self._state():
                progress = True
                yield each
            if not progress:
                return

    def _take(self, length: int) -> bytes:
        taken = bytes(self._data[:length])
        del self._data[:length]
        return taken

    # -- states: each yields what it has consumed, nothing if it needs more bytes ----------------------------------

    def _head(self) -> Iterator[RequestBegins | bytes]:
        end = self._data.find(b"\r\n\r\n", 0, LONGEST_HEAD)
        if end < 0:
            if len(self._data) >= LONGEST_HEAD:
                raise BadRequest("the head is too long")
            if not _could_be_request(self._data):
                raise BadRequest("this is not HTTP/1")
            return
        head = parse_head(bytes(self._data[:end]))
        self._left = head.length
        self._state = self._chunk_size if head.chunked else self._body if head.length else self._head
        yield RequestBegins(head.host, head.port)
        yield self._take(end + 4)

    def _body(self) -> Iterator[bytes]:
        piece = self._take(min(self._left, len(self._data)))
        self._left -= len(piece)
        if not self._left:
            self._state = self._head
        yield piece

    def _line(self) -> bytes | None:
        end = self._data.find(b"\r\n", 0, _LONGEST_LINE)
        if end < 0:
            if len(self._data) >= _LONGEST_LINE:
                raise BadRequest("a line is too long")
            return None
        return bytes(self._data[:end])

    def _chunk_size(self) -> Iterator[bytes]:
        if (line := self._line()) is None:
            return
        if (match := _CHUNK.fullmatch(line)) is None:
            raise BadRequest("a chunk has no size")
        self._left = int(match[1], 16)
        self._state = self._chunk if self._left else self._trailer
        yield self._take(len(line) + 2)

    def _chunk(self) -> Iterator[bytes]:
        if self._left:
            piece = self._take(min(self._left, len(self._data)))
            self._left -= len(piece)
            yield piece
        elif len(self._data) >= 2:
            if self._data[:2] != b"\r\n":
                raise BadRequest("a chunk is longer than it says")
            self._state = self._chunk_size
            yield self._take(2)

    def _trailer(self) -> Iterator[bytes]:
        if (line := self._line()) is None:
            return
        if not line:
            self._state = self._head
        elif not _FIELD.fullmatch(line):
            raise BadRequest("a trailer is malformed")
        yield self._take(len(line) + 2)


class RequestHead(NamedTuple):
    """What matters in the head of a request."""

    host: str
    port: int
    length: int
    chunked: bool


def _could_be_request(data: bytearray) -> bool:
    """Whether bytes may begin a request: a method, and no other control characters than line ends and tabs."""
    first = bytes(data[:32]).split(b" ")[0]
    return re.fullmatch(_TOKEN, first) is not None and b"\0" not in data


def parse_head(head: bytes) -> RequestHead:
    """Parse a request line and header fields, without the empty line. BadRequest."""
    first, *lines = head.split(b"\r\n")
    if (request := _REQUEST.fullmatch(first)) is None:
        raise BadRequest("the request line is malformed")
    method, target, minor = request[1], request[2], request[3]
    fields: dict[bytes, list[bytes]] = {}
    for line in lines:
        if (field := _FIELD.fullmatch(line)) is None:
            raise BadRequest("a header field is malformed")
        fields.setdefault(field[1].lower(), []).append(field[2])
    if method == b"CONNECT" or method == b"PRI" or b"upgrade" in fields:
        raise BadRequest("the connection would become something else")
    hosts = fields.get(b"host", [])
    if len(hosts) != 1:
        raise BadRequest("the request has no host, or several")
    if (absolute := _ABSOLUTE.fullmatch(target)) is not None:
        if absolute[1].lower() != hosts[0].lower():
            raise BadRequest("the request has two hosts")
    elif not target.startswith(b"/") and not (target == b"*" and method == b"OPTIONS"):
        raise BadRequest("the request's target has an odd form")
    if (host := _HOST.fullmatch(hosts[0])) is None:
        raise BadRequest("the host is malformed")
    length, chunked = _length(fields, minor)
    return RequestHead(host[1].decode(), int(host[2] or 80), length, chunked)


def _length(fields: dict[bytes, list[bytes]], minor: bytes) -> tuple[int, bool]:
    """Return the length of the body, and whether it comes in chunks."""
    codings, lengths = fields.get(b"transfer-encoding", []), fields.get(b"content-length", [])
    if codings:
        if codings != [codings[0]] or codings[0].lower() != b"chunked" or lengths or minor == b"0":
            raise BadRequest("the length of the body is ambiguous")
        return 0, True
    if len(lengths) > 1 or (lengths and not re.fullmatch(rb"[0-9]{1,18}", lengths[0])):
        raise BadRequest("the length of the body is ambiguous")
    return int(lengths[0]) if lengths else 0, False
