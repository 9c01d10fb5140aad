"""Input and output of a running process over one HTTP exchange: frames both ways, at the same time.

The request body (chunked) carries frames towards the process while the response body already carries its
output; `insula.model.stream` says what is in a frame. The socket never blocks: what the server does not take
yet waits in `pending`, so that a caller who stops reading its own input while `pending` is not empty passes the
back-pressure on and can't deadlock with a process that first wants its output taken.
"""

from __future__ import annotations

from insula.client.http import CHUNK, Dechunker, Response, chunk, connect, head, send
from insula.model.cpython import socket
from insula.model.errors import Unavailable
from insula.model.stream import MAX_PAYLOAD, Decoder, Kind, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Attachment:
    """One attached process. Iterate the frames from it, or drive it with poll(2) through `fileno`, `flush`, `receive`.

    Raises the typed errors of the server on opening. Frames end with EXIT or ERROR; an end without either
    means that the server went away (Unavailable).
    """

    def __init__(self, path: str, target: str, opening: bytes | None = None) -> None:
        """Opens the exchange; `opening` is the payload of an OPEN frame, what an exec begins with."""
        self.sock: socket.socket = connect(path)
        try:
            first = chunk(encode(Kind.OPEN, opening)) if opening is not None else b""
            fields = ("transfer-encoding: chunked", "content-type: application/vnd.insula.frames")
            send(self.sock, [head("POST", target, *fields) + first])
            self._response = Response(self.sock).check()
        except BaseException:
            self.sock.close()
            raise
        self._dechunk = Dechunker()
        self._decoder = Decoder()
        self._early = self._response.take_buffered()
        self.pending = bytearray()
        self.sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Queues a frame towards the process and sends what the server takes at once."""
        for start in range(0, len(payload) or 1, MAX_PAYLOAD):
            self.pending += chunk(encode(kind, payload[start : start + MAX_PAYLOAD]))
        self.flush()

    def flush(self) -> None:
        """Sends queued frames as far as the server takes them; nothing is raised when it is gone (see `receive`)."""
        try:
            while self.pending:
                del self.pending[: self.sock.send(self.pending[:CHUNK], socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.pending.clear()

    def receive(self) -> Iterator[tuple[Kind, bytes]]:
        """The frames that have arrived, without waiting for more. Unavailable when the server has gone."""
        data, self._early = self._early, b""
        if not data:
            try:
                data = self.sock.recv(CHUNK)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                raise Unavailable("insulad went away; the process keeps running", "attach again when insulad is back")
        for piece in self._dechunk.feed(data):
            yield from self._decoder.feed(piece)

    def buffered(self) -> bool:
        """True while `receive` has something to give that poll(2) can't see."""
        return bool(self._early)

    def __iter__(self) -> Iterator[tuple[Kind, bytes]]:
        """All frames as they arrive, up to and with EXIT or ERROR."""
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
        """Detaches: the process keeps running."""
        self.sock.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
