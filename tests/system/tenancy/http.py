"""HTTP on a unix socket with header fields of one's own, for tests of the API itself."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.wait import patiently


class HttpAnswer(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def exchange(
    path: Path, method: str, target: str, body: object = None, *, token: str | None = None, **fields: str
) -> HttpAnswer:
    """Send a request, and return the whole answer. A body of bytes is sent as it is, others as JSON. `fields` have `_`
    in place of `-`."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {target} HTTP/1.1", "host: insula", "connection: close", f"content-length: {len(data)}"]
    lines += ["content-type: application/json"] if data and not isinstance(body, bytes) else []
    lines += [f"authorization: Bearer {token}"] if token else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patiently(60))
        sock.connect(str(path))
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    return parsed(answer)


def parsed(answer: bytes) -> HttpAnswer:
    """The bytes of a whole answer as one."""
    if not answer:
        raise ConnectionError("the server has closed the connection without an answer")
    top, _, rest = answer.partition(b"\r\n\r\n")
    line, *head = top.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in head)}
    body = b"".join(dechunked(rest)) if headers.get("transfer-encoding") == "chunked" else rest
    return HttpAnswer(int(line.split()[1]), headers, body)


def dechunked(data: bytes) -> Iterator[bytes]:
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size or b"0", 16)
        yield rest[:length]
        data = rest[length + 2 :]
