"""A minimal HTTP/1.1 client over a unix socket (RFC 9112).

Each request has a connection of its own, because connecting to a unix socket is cheap. `http.client` is not used: it
can't read a response while it still sends the request, which attach and exec need, and importing it (with the email
package) takes longer than a whole `insula ps`.
"""

from __future__ import annotations

from insula.model.cpython import dumps, loads, socket
from insula.model.errors import Denied, Failed, InsulaError, Unavailable, from_dict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

CHUNK = 65536
MAX_HEAD = 65536
MAX_CHUNK_LINE = 1024
MAX_ERROR_BODY = 1 << 20
_START_HINT = "start the daemon: `systemctl start insulad`, or scripts/up where there is no systemd"


def quote(text: str, safe: bytes = b"-._~") -> str:
    """Percent-encode `text` for one segment of a path or one value of a query (RFC 3986, 2.1)."""
    return "".join(
        chr(byte) if (chr(byte).isalnum() and byte < 128) or byte in safe else f"%{byte:02X}"
        for byte in text.encode("utf-8", "surrogateescape")
    )


def target(*segments: str, **query: object) -> str:
    """Make the request target /v1/SEGMENT/…?NAME=VALUE; None values are left out, lists repeat their name."""
    pairs = []
    for name, value in query.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                text = str(item).lower() if isinstance(item, bool) else str(item)
                pairs.append(f"{name}={quote(text)}")
    path = "/v1/" + "/".join(quote(segment) for segment in segments)
    return path + "?" + "&".join(pairs) if pairs else path


class Dechunker:
    """A decoder for a chunked body (RFC 9112, 7.1), fed with data as it arrives; `done` after its last chunk."""

    def __init__(self) -> None:
        self.done = False
        self._buffer = bytearray()
        self._left = 0  # missing bytes of the current chunk
        self._after = False  # the line end after a chunk is missing

    @property
    def rest(self) -> bytes:
        """What has arrived after the last chunk: an empty line, if the connection can be used again."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Return the pieces of the body in `data`. Failed if it is not a chunked body."""
        self._buffer += data
        while self._buffer and not self.done:
            if self._left:
                piece = bytes(self._buffer[: self._left])
                del self._buffer[: len(piece)]
                self._left -= len(piece)
                self._after = not self._left
                yield piece
                continue
            end = self._buffer.find(b"\r\n")
            if end < 0:
                if len(self._buffer) > MAX_CHUNK_LINE:
                    raise Failed("the response is not a valid chunked body", "check what listens on the socket")
                return
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            if self._after:
                self._after = False
                continue
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise Failed("the response is not a valid chunked body", "check what listens on the socket") from None
            self.done = not self._left


def parse_head(text: str) -> tuple[int, dict[str, str]]:
    """Return the status and the header fields, names in lower case, of a response (RFC 9112, 4). Failed."""
    status_line, *lines = text.split("\r\n")
    version, _, rest = status_line.partition(" ")
    if not version.startswith("HTTP/1.") or not (rest[:3].isascii() and rest[:3].isdigit()):
        raise Failed(f"{status_line[:60]!r} is not an HTTP response", "check what listens on the socket")
    fields = (line.partition(":") for line in lines)
    return int(rest[:3]), {name.strip().lower(): value.strip() for name, _, value in fields}


class Response:
    """The response to a request: `status`, `headers` (names in lower case) and a body, which is read as it arrives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()
        head = self._read_head()
        self.status, self.headers = parse_head(head)
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        length = self.headers.get("content-length")
        self._left: int | None = int(length) if length is not None and not self._chunked else None

    def _read_head(self) -> str:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise Failed("the response has no end of its header", "check what listens on the socket")
            self._fill()
        head = self._buffer[:end].decode("latin-1")
        del self._buffer[: end + 4]
        return head

    def _fill(self) -> None:
        """Receive more data into the buffer. Unavailable if the connection ends."""
        try:
            data = self.sock.recv(CHUNK)
        except ConnectionResetError:
            data = b""
        if not data:
            raise Unavailable("insulad closed the connection before it responded", "see its log, then try again")
        self._buffer += data

    def take_buffered(self) -> bytes:
        """Return the start of the body that was received together with the header."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def _take(self) -> bytes:
        """Return at least one byte of the body as it was sent."""
        if not self._buffer:
            self._fill()
        return self.take_buffered()

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body in pieces as they arrive; Unavailable if the connection ends before the body."""
        if self._chunked:
            dechunker = Dechunker()
            while not dechunker.done:
                yield from dechunker.feed(self._take())
        elif self._left is None:
            raise Failed("the response has no length", "check what listens on the socket")
        else:
            while self._left:
                yield (data := self._take()[: self._left])
                self._left -= len(data)

    def read(self) -> bytes:
        """Read the whole body."""
        if self.status in (204, 304):
            return b""
        return b"".join(self)

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of the body as they arrive, without line ends."""
        rest = b""
        for data in self:
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
        if rest:
            yield rest

    def json(self) -> Any:
        """Return the body parsed as JSON; None if it is empty."""
        body = self.read()
        return loads(body) if body else None

    def check(self) -> Response:
        """Return this response if it is a success; otherwise raise its error."""
        if self.status < 400:
            return self
        try:
            raise error_of(self.status, self.read()[:MAX_ERROR_BODY])
        finally:
            self.close()

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def error_of(status: int, body: bytes) -> InsulaError:
    """Return the error in a body from `InsulaError.to_problem`; Failed with the status for any other body."""
    try:
        data = loads(body)
        if isinstance(data, dict) and isinstance(data.get("detail") or data.get("message"), str):
            return from_dict(data)
    except ValueError:
        pass
    return Failed(f"the daemon responded {status}: {body[:200].decode('utf-8', 'replace').strip()!r}")


def connect(path: str, timeout: float | None = None) -> socket.socket:
    """Connect to the daemon's socket. Unavailable if no daemon listens, Denied without permission."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout)
    try:
        sock.connect(path)
    except PermissionError:
        sock.close()
        raise Denied(
            f"{path} can't be opened: permission denied", "be root or a member of the group `insula`"
        ) from None
    except OSError as error:
        sock.close()
        reason = f"insulad does not answer at {path} ({error.strerror or error})"
        raise Unavailable(reason, _START_HINT) from None
    return sock


class Remote:
    """The daemon to which requests are sent: the socket at `path`; `token` proves who sends them (RFC 6750).

    A subclass with another `connect` reaches it elsewhere (client/https.py).
    """

    def __init__(self, path: str, token: str | None = None) -> None:
        self.path = path
        self.fields = (f"authorization: Bearer {token}",) if token else ()

    def connect(self, timeout: float | None = None) -> socket.socket:
        return connect(self.path, timeout)


def request(
    remote: Remote,
    method: str,
    target: str,
    *,
    body: object = None,
    upload: Iterable[bytes] | None = None,
    timeout: float | None = None,
) -> Response:
    """Send a request to `remote`, and return its response after checking it for success.

    `body` is sent as JSON, or `upload` in chunks. If the server responds before the end of the upload, as when it
    refuses it, the upload stops.
    """
    sock = remote.connect(timeout)
    try:
        if upload is not None:
            fields = ("transfer-encoding: chunked", "content-type: application/octet-stream")
            send(sock, [head(method, target, *remote.fields, *fields)])
            send(sock, (chunk(data) for data in upload))
            send(sock, [b"0\r\n\r\n"])
        elif body is not None:
            data = dumps(body).encode()
            fields = (f"content-length: {len(data)}", "content-type: application/json")
            send(sock, [head(method, target, *remote.fields, *fields), data])
        else:
            send(sock, [head(method, target, *remote.fields, "content-length: 0")])
        return Response(sock).check()
    except BaseException:
        sock.close()
        raise


def head(method: str, target: str, *headers: str) -> bytes:
    """Encode the request line and header fields."""
    lines = (f"{method} {target} HTTP/1.1", "host: insula", "connection: close", *headers, "", "")
    return "\r\n".join(lines).encode("ascii")


def chunk(data: bytes) -> bytes:
    """Encode one chunk of a chunked body (RFC 9112, 7.1); empty data, which would end the body, gives nothing."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def send(sock: socket.socket, pieces: Iterable[bytes]) -> None:
    """Send data until the server closes its side: it may refuse a request early, and its response has the reason.

    SIGPIPE is suppressed: it ends the command line silently if the reader of its output has gone, which must not happen
    if the daemon has gone.
    """
    for piece in pieces:
        try:
            sock.sendall(piece, socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            return
