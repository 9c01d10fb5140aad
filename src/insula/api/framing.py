"""Requests whose bounds or meaning another parser might see differently are refused (RFC 9112, 11.2).

h11 accepts what the RFC lets a recipient repair: line ends without CR, folded fields, a length beside chunks, a length
twice. Behind a proxy that repairs otherwise, the end of one request would be the beginning of another one (request
smuggling). So `StrictConnection` looks at each head again. It also has the status for each refusal, and turns the
absolute form of a target, which clients of proxies send, to the origin form.
"""

from __future__ import annotations

import re
from typing import Any, Final

import h11

MAX_HEAD: Final = 64 << 10
"""Bytes of a request's head."""
_UNCLEAR: Final = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ABSOLUTE: Final = re.compile(rb"https?://(?P<host>[^/?#]+)(?P<rest>[^#]*)", re.IGNORECASE)
_HOST: Final = re.compile(rb"([A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")
_LENGTHS: Final = re.compile(rb"\ncontent-length:", re.IGNORECASE)


class Refused(h11.RemoteProtocolError):
    """A request is not clear. `error_status_hint` is the status of the answer."""


class StrictConnection(h11.Connection):
    """A server's connection of h11. After a `RemoteProtocolError`, `refused` is its reason, (status, text), and
    `in_body` whether the head of the request was clear."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD)
        self.refused = (400, "it can't be parsed")
        self.in_body = False

    def next_event(self) -> Any:
        """Return what h11's `next_event` does. RemoteProtocolError, also for what h11 alone accepts."""
        self.in_body = self.their_state is not h11.IDLE
        before = b"" if self.in_body else self.trailing_data[0]
        try:
            event = super().next_event()
            if type(event) is not h11.Request:
                return event
            _check(event, before[: len(before) - len(self.trailing_data[0])])
            return _in_origin_form(event)
        except h11.RemoteProtocolError as error:
            # what follows a colon quotes the request
            self.refused = (error.error_status_hint, str(error).partition(":")[0])
            if error.error_status_hint == 431:
                self.refused = _too_long(before)
            raise


def _too_long(head: bytes) -> tuple[int, str]:
    """The status and the reason for a head that is too long, or for one of a chunk; then `head` is empty."""
    if head and b"\n" not in head[:MAX_HEAD]:
        return 414, f"its target is longer than {MAX_HEAD >> 10} KiB"
    return 431, f"a head in it is longer than {MAX_HEAD >> 10} KiB"


def _check(request: h11.Request, head: bytes) -> None:
    """Raise Refused for a request that is not clear. `head` are the bytes that it was parsed from."""
    if len(head) > MAX_HEAD:
        raise Refused("", error_status_hint=431)
    if _UNCLEAR.search(head):
        raise Refused("its head has a control character, a line end without CR, or a folded field")
    if request.http_version not in (b"1.1", b"1.0"):
        raise Refused("its version is neither HTTP/1.1 nor HTTP/1.0", error_status_hint=505)
    fields = dict(request.headers)
    if b"transfer-encoding" in fields:
        if b"content-length" in fields:
            raise Refused("it has both Transfer-Encoding and Content-Length")
        if request.http_version == b"1.0":
            raise Refused("HTTP/1.0 has no Transfer-Encoding")
    elif b"content-length" in fields and (len(_LENGTHS.findall(head)) > 1 or b"," in _length(head)):
        raise Refused("it has more than one Content-Length")
    if not _HOST.fullmatch(fields.get(b"host", b"")):
        raise Refused("its Host is not a host")


def _length(head: bytes) -> bytes:
    """The line with the field Content-Length."""
    found = _LENGTHS.search(head)
    assert found is not None
    return head[found.end() : head.index(b"\r\n", found.end())]


def _in_origin_form(request: h11.Request) -> h11.Request:
    """Return the request with a target that is a path (RFC 9112, 3.2). Refused for the targets of proxies."""
    target = request.target
    if target.startswith(b"/") or (target == b"*" and request.method == b"OPTIONS"):
        return request
    found = _ABSOLUTE.fullmatch(target)
    if found is None or request.method == b"CONNECT" or not _HOST.fullmatch(found["host"]):
        raise Refused("its target is no path, and no URL of HTTP")
    rest = found["rest"]
    path = rest if rest.startswith(b"/") else b"/" + rest
    return h11.Request(
        method=request.method, target=path, headers=[*request.headers], http_version=request.http_version
    )
