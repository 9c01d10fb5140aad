"""Input and output of a running process over one HTTP exchange: frames in both directions at the same time.

The request body (chunked) has frames to the process, while the response body has its output; `insula.model.stream`
defines the frames. The socket never blocks: data that the server does not accept yet is kept in `pending`. A caller
that stops reading its own input while `pending` is not empty passes the back-pressure on, and can't deadlock with a
process whose output must be read first.
"""

from __future__ import annotations

from insula.client.http import CHUNK, Dechunker, Response, chunk, head, send
from insula.model.cpython import socket
from insula.model.errors import Unavailable
from insula.model.stream import MAX_PAYLOAD, Decoder, Kind, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from insula.client.http import Remote


class Attachment:
    """An attached process. Iterate over its frames, or use poll(2) with `fileno`, `flush` and `receive`.

    `name` is the name of the instance that the request created, else "".
    The constructor raises the server's errors. The last frame is EXIT or ERROR; an end without one means that the
    server has gone (Unavailable).
    """

    def __init__(self, remote: Remote, target: str, opening: bytes | None = None) -> None:
        """Open the exchange; `opening` is the payload of an OPEN frame, for an exec."""
        self.sock: socket.socket = remote.connect()
        try:
            first = chunk(encode(Kind.OPEN, opening)) if opening is not None else b""
            fields = ("transfer-encoding: chunked", "content-type: application/vnd.insula.frames", *remote.fields)
            send(self.sock, [head("POST", target, *fields) + first])
            self._response = Response(self.sock).check()
        except BaseException:
            self.sock.close()
            raise
        self._dechunk = Dechunker()
        self._decoder = Decoder()
        self._early = self._response.take_buffered()
        self.name = self._response.headers.get("x-insula-name", "")
        self.pending = bytearray()
        self.sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Queue a frame to the process, and send as much as the server accepts now."""
        for start in range(0, len(payload) or 1, MAX_PAYLOAD):
            self.pending += chunk(encode(kind, payload[start : start + MAX_PAYLOAD]))
        self.flush()

    def flush(self) -> None:
        """Send queued frames as far as the server accepts them; `receive` raises the error if the server has gone."""
        try:
            while self.pending:
                del self.pending[: self.sock.send(self.pending[:CHUNK], socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.pending.clear()

    def receive(self) -> Iterator[tuple[Kind, bytes]]:
        """Return the frames that have arrived, without waiting. Unavailable if the server has gone."""
        data, self._early = self._early, b""
        if not data:
            try:
                data = self.sock.recv(CHUNK)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                raise Unavailable(
                    "insulad closed the connection; the process keeps running", "attach again when insulad runs"
                )
        for piece in self._dechunk.feed(data):
            yield from self._decoder.feed(piece)

    def buffered(self) -> bool:
        """Whether `receive` has buffered frames, which poll(2) doesn't report."""
        return bool(self._early)

    def __iter__(self) -> Iterator[tuple[Kind, bytes]]:
        """Yield all frames as they arrive, up to EXIT or ERROR."""
        import select

        poller = select.poll()
        while True:
            if not self.buffered():
                poller.register(self.sock, select.POLLIN | (select.POLLOUT if self.pending else 0))
                poller.poll()
            self.flush()
            for kind, payload in self.receive():
                if kind is not Kind.IDLE:
                    yield kind, payload
                if kind in (Kind.EXIT, Kind.ERROR):
                    return

    def close(self) -> None:
        """Detach; the process keeps running."""
        self.sock.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
