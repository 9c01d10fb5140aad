"""Transports by HTTP/1.1: over a unix socket, and over TLS.

Connections are used again: over TLS a new one takes two round trips. One that was idle for `IDLE` seconds, or that the
server has closed, is not.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence

from insula.client.client import default_socket
from insula.client.http import MAX_HEAD, Dechunker, chunk, parse_head
from insula.client.https import CONNECT, context_of, explained, split
from insula.model.errors import Failed, Unavailable
from insula.sdk._sync.network import Lock, Socket
from insula.sdk._sync.tls import TLSSocket
from insula.sdk.messages import ConnectionLost, HTTPHead, HTTPRequest, encoded
from insula.sdk.sockets import reason

IDLE = 3.0
"""The server closes connections that were idle for 5 seconds."""
_MOST_IDLE = 8  # connections


class HTTPTransport:
    """A server at the other end of sockets that subclasses connect."""

    def __init__(self) -> None:
        self._idle: list[tuple[float, Socket | TLSSocket]] = []
        self._closed = False

    def connect(self) -> Socket | TLSSocket:
        """Connect to the server. Unavailable, Denied."""
        raise NotImplementedError

    def open(self, request: HTTPRequest) -> HTTPExchange:
        """Send a request, without waiting for the response. Unavailable, Denied."""
        exchange = HTTPExchange(self, self._kept() or self.connect())
        try:
            exchange.begin(request)
        except BaseException:
            exchange.close()
            raise
        return exchange

    def close(self) -> None:
        """Close all connections that are not in use; the others are closed after their use."""
        self._closed = True
        while self._idle:
            self._idle.pop()[1].shut()

    def keep(self, sock: Socket | TLSSocket) -> None:
        """Take back a connection whose last response was read."""
        if self._closed or len(self._idle) >= _MOST_IDLE:
            sock.shut()
        else:
            self._idle.append((time.monotonic(), sock))

    def _kept(self) -> Socket | TLSSocket | None:
        """Return a connection that can be used again."""
        while True:
            try:
                since, sock = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - since < IDLE and not sock.stale():
                return sock
            sock.shut()


class UnixTransport(HTTPTransport):
    """The daemon of this machine. `path` is its socket, by default that of the command line. `timeout` is in seconds,
    for each step of a request; None is no timeout."""

    def __init__(self, path: str | None = None, *, timeout: float | None = None) -> None:
        super().__init__()
        self.path = path or default_socket()
        self.timeout = timeout

    def connect(self) -> Socket:
        return Socket.unix(self.path, self.timeout)


class HTTPSTransport(HTTPTransport):
    """A daemon on another machine: `address` is HOST:PORT, or several ones that are tried in order.

    The server is trusted by `authority`, Insula's own (PEM); authorities of the system are not looked at. TLS 1.3 only.
    `certificate` names a file with the client's certificate and key (PEM), which proves who it is if there is no token.
    `timeout` is in seconds, for each step of a request; None is no timeout.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        authority: str,
        certificate: str | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__()
        self.addresses = [address] if isinstance(address, str) else [*address]
        self.timeout = timeout
        self._context: ssl.SSLContext = context_of(authority, certificate)

    def connect(self) -> TLSSocket:
        problems = []
        for address in self.addresses:
            host, port = split(address)
            try:
                plain = Socket.tcp(host, port, CONNECT)
            except OSError as error:
                problems.append(f"{address}: {reason(error)}")
                continue
            try:
                secure = TLSSocket(plain, self._context, host)
                secure.handshake(address)
                plain.limit(self.timeout)
            except BaseException as error:
                plain.shut()
                if isinstance(error, OSError):
                    raise explained(error, address) from None
                raise
            return secure
        raise Unavailable("; ".join(problems) or "there is no address", "is insulad running there, and reachable?")


class HTTPExchange:
    """A request on a connection, and its response (RFC 9112)."""

    def __init__(self, transport: HTTPTransport, sock: Socket | TLSSocket) -> None:
        self._transport = transport
        self._sock = sock
        self._writing = Lock()  # a chunk is sent as a whole
        self._sent = False
        self._head: HTTPHead | None = None
        self._buffer = b""
        self._left: int | None = 0  # of a body with Content-Length; None is a chunked one
        self._dechunk = Dechunker()
        self._over = False
        self._closed = False

    def begin(self, request: HTTPRequest) -> None:
        """Send the head, and the body if it is known."""
        self._sock.write(encoded(request))  # if it fails, the response may tell why
        self._sent = request.body is not None

    def send(self, data: bytes) -> bool:
        if not data:
            return True
        with self._writing:
            return self._sock.write(chunk(data))

    def end(self) -> None:
        with self._writing:
            self._sent = self._sock.write(b"0\r\n\r\n")

    def head(self) -> HTTPHead:
        if self._head is None:
            while (end := self._buffer.find(b"\r\n\r\n")) < 0:
                if len(self._buffer) > MAX_HEAD:
                    raise Failed("the response has no end of its header", "check what listens at this address")
                self._buffer += self._read()
            self._head = HTTPHead(*parse_head(self._buffer[:end].decode("latin-1")))
            self._buffer = self._buffer[end + 4 :]
            self._frame(self._head)
        return self._head

    def _frame(self, head: HTTPHead) -> None:
        """Find out how long the body is. Failed if that can't be known."""
        length = head.fields.get("content-length")
        if head.fields.get("transfer-encoding", "").lower() == "chunked":
            self._left = None
        elif length is not None and length.isascii() and length.isdigit():
            self._left = int(length)
        elif head.status not in (204, 304):
            raise Failed("the response has no length", "check what listens at this address")
        self._over = self._left == 0

    def receive(self) -> bytes:
        self.head()
        while not self._over:
            data, self._buffer = self._buffer or self._read(), b""
            if self._left is None:
                piece = b"".join(self._dechunk.feed(data))
                self._over = self._dechunk.done
            else:
                piece = data[: self._left]
                self._left -= len(piece)
                self._over = self._left == 0
            if piece:
                return piece
        return b""

    def _read(self) -> bytes:
        if not (data := self._sock.read()):
            what = "before it responded" if self._head is None else "before the end of its answer"
            raise ConnectionLost(f"insulad closed the connection {what}", "see its log, then try again")
        return data

    def close(self) -> None:
        """Close the connection, or keep it for another request if the response was read to its end."""
        if self._closed:
            return
        self._closed = True
        close = self._head is None or self._head.fields.get("connection", "").lower() == "close"
        whole = self._left == 0 or self._dechunk.rest == b"\r\n"
        if self._sent and self._over and whole and not close:
            self._transport.keep(self._sock)
        else:
            self._sock.shut()
