"""Relay the streams of one process between its pipes or terminal, its log, and attached clients.

Output goes to the log and to each attached client. No output is lost for a client that reads slowly: while its backlog
is long nothing is read from the process, which then blocks, as with any full pipe.
A client's messages are one byte of `insula.model.stream.Kind` and the payload.

Output costs the monitor processor time that is not charged to the tenant, and bandwidth of a shared disk. So output
that goes to a log, or to no one, is limited by a token bucket for each process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from collections import deque
from typing import Any

from insula.container.log import LogWriter
from insula.model.stream import RESIZE, Kind

CHUNK = 32 << 10
_BACKLOG = 1 << 20
_LAST = 256  # pieces of output read after the end: as many packets as the largest pipe holds (pipe(7))
LEAST = 1024
"""The least cost of a piece of output, in bytes: a single byte takes a system call, a record and a write as well. Only
packets (pipe2(2), O_DIRECT) and programs that pause between bytes make such pieces: a read gets all that a pipe has."""
RATE = 8 << 20
BURST = 64 << 20
"""The rate of output to a log, in bytes a second, and the size of the token bucket, in bytes."""
_TIOCSWINSZ = 0x5414
_OUTPUTS = {"stdout": Kind.STDOUT, "stderr": Kind.STDERR, "tty": Kind.STDOUT}


class AttachedClient:
    """An attached client: a socket, and messages that are not sent yet."""

    def __init__(self, sock: socket.socket, *, stdin: bool) -> None:
        self.sock = sock
        self.stdin = stdin
        self.closing = False  # once the backlog is gone
        self._queue: deque[bytes] = deque()
        self.backlog = 0

    def state(self) -> dict[str, Any]:
        """The client as JSON, for `restored`."""
        queue = [message.decode("latin-1") for message in self._queue]
        return {"fd": self.sock.fileno(), "stdin": self.stdin, "closing": self.closing, "queue": queue}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> AttachedClient:
        """The client that `state` describes, with its socket."""
        client = cls(socket.socket(fileno=state["fd"]), stdin=state["stdin"])
        client.closing = state["closing"]
        client._queue.extend(message.encode("latin-1") for message in state["queue"])
        client.backlog = sum(map(len, client._queue))
        return client

    def push(self, kind: Kind, data: bytes = b"") -> None:
        message = bytes((kind,)) + data
        self._queue.append(message)
        self.backlog += len(message)

    def flush(self) -> bool:
        """Send messages until the socket is full; False if the client is gone."""
        while self._queue:
            try:
                self.sock.send(self._queue[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                return False
            self.backlog -= len(self._queue.popleft())
        return not self.closing

    @property
    def full(self) -> bool:
        return self.backlog > _BACKLOG


class Session:
    """The streams of one process. `outputs` are the descriptors to read, `inputs` the one to write, if any."""

    def __init__(self, log: LogWriter | None, origin: dict[str, Any], *, discard: bool = False) -> None:
        self.log = log
        self.origin = origin  # what the zygote said of it
        self.discard = discard
        self.clients: list[AttachedClient] = []
        self.outputs: dict[int, Kind] = {}
        self.names: dict[int, str] = {}
        self.input: int | None = None
        self.terminal: int | None = None
        self.stdin_buffer = bytearray()  # towards the process, whose input may not be open yet
        self.stdin_closed = not (origin["tty"] or origin["stdin"])  # it has no input, or that was closed
        self.size: tuple[int, int] | None = None
        self.ended = False  # the input
        self.finished = False  # every output came to its end
        self.discard_at: float | None = None  # time.monotonic() after which no client will attach
        self.paused = False  # the monitor will come back to it when it has earned something
        self.reset_quota()

    def state(self) -> dict[str, Any]:
        """The session as JSON, for `restored`. Bytes are Latin-1 strings."""
        return {
            "origin": self.origin,
            "streams": [[name, fd] for fd, name in self.names.items()],
            "clients": [client.state() for client in self.clients],
            "discard": self.discard,
            "discard_at": self.discard_at,
            "stdin_buffer": self.stdin_buffer.decode("latin-1"),
            "stdin_closed": self.stdin_closed,
            "ended": self.ended,
            "finished": self.finished,
            "size": self.size,
        }

    @classmethod
    def restored(cls, state: dict[str, Any], log: LogWriter | None) -> Session:
        """The session that `state` describes, with its descriptors."""
        session = cls(log, state["origin"], discard=state["discard"])
        session.size = tuple(state["size"]) if state["size"] else None
        for name, fd in state["streams"]:
            session.add(name, fd)
        session.clients = [AttachedClient.restored(each) for each in state["clients"]]
        session.discard_at = state["discard_at"]
        session.stdin_buffer += state["stdin_buffer"].encode("latin-1")
        session.stdin_closed, session.ended = state["stdin_closed"], state["ended"]
        session.finished = state["finished"]
        return session

    def add(self, name: str, fd: int) -> None:
        """Add a stream. If it has one of that name already, the descriptor is a copy, and closed."""
        if name in self.names.values():
            os.close(fd)
            return
        self.names[fd] = name
        if name in _OUTPUTS:
            self.outputs[fd] = _OUTPUTS[name]
        if name in ("stdin", "tty"):
            self.input = fd
        if name == "tty":
            self.terminal = fd
            self._resize()

    def wants(self, fd: int) -> bool:
        """Whether to read `fd` now: there is a log or a client for it, and no client has a long backlog."""
        taken = self.log is not None or self.discard or bool(self.clients)
        return fd in self.outputs and taken and self._credit > 0 and not any(c.full for c in self.clients)

    @property
    def throttled(self) -> bool:
        """Whether its rate is used up, so that it is not read from until `refill`."""
        return self._credit <= 0

    def reset_quota(self) -> None:
        """Fill the token bucket: at the start, and at the end, when no more can come than what is in the pipes."""
        self._credit, self._since = float(BURST), time.monotonic()

    def refill(self) -> None:
        """Add tokens for the time that has passed."""
        now = time.monotonic()
        self._credit = min(BURST, self._credit + RATE * (now - self._since))
        self._since = now

    def read(self, fd: int) -> bool:
        """Relay one chunk of output; False at its end."""
        try:
            data = self._take(fd)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != errno.EIO:  # the other side of the terminal is closed
                raise
            data = b""
        if not data:
            return False
        if self.log or self.discard:
            self._credit -= max(LEAST, len(data))
            if self.throttled:
                self.refill()
        for client in self.clients:
            client.push(self.outputs[fd], data)
        return True

    def _take(self, fd: int) -> bytes:
        """Read one chunk and write it to the log. From a pipe no byte is lost if the monitor is killed meanwhile."""
        if self.log and fd != self.terminal:
            return self.log.move(self.outputs[fd], fd, CHUNK)
        data = os.read(fd, CHUNK)
        if self.log and data:
            self.log.write(self.outputs[fd], data)
        return data

    def drain(self) -> None:
        """Relay all that can be read now, after the end of the process."""
        for fd in list(self.outputs):
            # bounded: a process that joined may have left others behind that go on writing
            for _ in range(_LAST):
                before = [c.backlog for c in self.clients]
                if not self.read(fd) or before == [c.backlog for c in self.clients]:
                    break

    def receive(self, kind: Kind, payload: bytes) -> None:
        """Handle a message of a client: input, its end, or the size of its terminal."""
        if kind is Kind.STDIN and not self.stdin_closed:
            self.stdin_buffer += payload
        elif kind is Kind.STDIN_EOF:
            self.ended = True
        elif kind is Kind.RESIZE and len(payload) == RESIZE.size:
            self.size = RESIZE.unpack(payload)
            self._resize()

    def _resize(self) -> None:
        """Set the size of the terminal (TIOCSWINSZ, ioctl_tty(2)); if it is not open yet, when it is opened."""
        if self.terminal is not None and self.size is not None:
            fcntl.ioctl(self.terminal, _TIOCSWINSZ, struct.pack("4H", *self.size, 0, 0))

    def write(self) -> bool:
        """Write pending input; False when the stream is to be closed: at its end, or if it has no reader."""
        if self.input is None:
            return True
        while self.stdin_buffer:
            try:
                written = os.write(self.input, self.stdin_buffer)
            except BlockingIOError:
                return True
            except OSError:
                self.stdin_buffer.clear()
                return self.terminal is not None
            del self.stdin_buffer[:written]
        return not self.ended or self.terminal is not None

    def end_input(self) -> None:
        """Drop input that waits, and what comes: the process has ended. One that it has left behind gets no more; what
        that does not read would keep the client from asking for the rest of the output."""
        self.stdin_buffer.clear()
        self.stdin_closed = self.ended = True

    def close(self, fd: int) -> str:
        """Close one stream and return its name."""
        self.outputs.pop(fd, None)
        if self.input == fd:
            self.input = None
            self.stdin_closed = True
            self.stdin_buffer.clear()
        if self.terminal == fd:
            self.terminal = None
        os.close(fd)
        return self.names.pop(fd)
