"""One process's streams between its pipes or terminal, its log, and whoever is attached.

What the process prints goes to its log and to every attached client. A client that reads too slowly holds the
process up, as a pipe would, rather than losing output: reading pauses while a client's backlog is long.
A client's messages are one byte of `insula.model.stream.Kind` and the payload.

A process that prints as fast as it can costs the monitor time that is on nobody's account, and the disk that all share
a write for each byte. So what goes to a log, or to nobody, has a rate: a token bucket for each process.
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
"""What a piece of output costs at least, in bytes: one byte takes a system call, a record and a write, too. Only
packets (pipe2(2), O_DIRECT) and programs that wait between bytes come so; a pipe gives all that is in it."""
RATE = 8 << 20
BURST = 64 << 20
"""What a process may print to its log: bytes a second, and bytes at once after a silence."""
_TIOCSWINSZ = 0x5414
_OUTPUTS = {"stdout": Kind.STDOUT, "stderr": Kind.STDERR, "tty": Kind.STDOUT}


class Client:
    """Somebody attached: a socket, and what has not gone out yet."""

    def __init__(self, sock: socket.socket, *, stdin: bool) -> None:
        self.sock = sock
        self.stdin = stdin
        self.closing = False  # once the backlog is gone
        self._queue: deque[bytes] = deque()
        self.backlog = 0

    def state(self) -> dict[str, Any]:
        """All of it as JSON, for `restored`."""
        queue = [message.decode("latin-1") for message in self._queue]
        return {"fd": self.sock.fileno(), "stdin": self.stdin, "closing": self.closing, "queue": queue}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Client:
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
        """Send what the socket takes; False if the client is gone."""
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
        self.clients: list[Client] = []
        self.outputs: dict[int, Kind] = {}
        self.names: dict[int, str] = {}
        self.input: int | None = None
        self.terminal: int | None = None
        self.stdin_buffer = bytearray()  # towards the process, whose input may not be open yet
        self.stdin_closed = not (origin["tty"] or origin["stdin"])  # it has no input, or that was closed
        self.size: tuple[int, int] | None = None
        self.ended = False  # the input
        self.finished = False  # every output came to its end
        self.discard_at: float | None = None  # time.monotonic() from which nobody will attach any more
        self.paused = False  # the monitor will come back to it when it has earned something
        self.reset_quota()

    def state(self) -> dict[str, Any]:
        """All of it as JSON, for `restored`. Bytes are Latin-1 strings, which JSON holds as they are."""
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
        session.clients = [Client.restored(each) for each in state["clients"]]
        session.discard_at = state["discard_at"]
        session.stdin_buffer += state["stdin_buffer"].encode("latin-1")
        session.stdin_closed, session.ended = state["stdin_closed"], state["ended"]
        session.finished = state["finished"]
        return session

    def add(self, name: str, fd: int) -> None:
        """Take over a stream; a name that is known already is a second copy, and closed."""
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
        """Whether to read `fd` now: somebody must take it, and nobody be too far behind."""
        taken = self.log is not None or self.discard or bool(self.clients)
        return fd in self.outputs and taken and self._credit > 0 and not any(c.full for c in self.clients)

    @property
    def throttled(self) -> bool:
        """Whether it has printed too much, and is not read from until `refill`."""
        return self._credit <= 0

    def reset_quota(self) -> None:
        """All credit: it begins, or it has ended and can print no more than what is in its pipes."""
        self._credit, self._since = float(BURST), time.monotonic()

    def refill(self) -> None:
        """Credit for the time that has passed."""
        now = time.monotonic()
        self._credit = min(BURST, self._credit + RATE * (now - self._since))
        self._since = now

    def read(self, fd: int) -> bool:
        """Move one chunk of output; False at its end."""
        try:
            data = self._take(fd)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that nobody holds on the other side any more
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
        """One chunk, which is in the log when this returns. From a pipe none is lost if we are killed meanwhile."""
        if self.log and fd != self.terminal:
            return self.log.move(self.outputs[fd], fd, CHUNK)
        data = os.read(fd, CHUNK)
        if self.log and data:
            self.log.write(self.outputs[fd], data)
        return data

    def drain(self) -> None:
        """Read what is there without waiting: the process has ended."""
        for fd in list(self.outputs):
            # bounded: a process that joined may have left others behind that go on writing
            for _ in range(_LAST):
                before = [c.backlog for c in self.clients]
                if not self.read(fd) or before == [c.backlog for c in self.clients]:
                    break

    def receive(self, kind: Kind, payload: bytes) -> None:
        """What a client sends: input, its end, or the size of its terminal."""
        if kind is Kind.STDIN and not self.stdin_closed:
            self.stdin_buffer += payload
        elif kind is Kind.STDIN_EOF:
            self.ended = True
        elif kind is Kind.RESIZE and len(payload) == RESIZE.size:
            self.size = RESIZE.unpack(payload)
            self._resize()

    def _resize(self) -> None:
        """TIOCSWINSZ (ioctl_tty(2)); a terminal that is not open yet gets its size when it is."""
        if self.terminal is not None and self.size is not None:
            fcntl.ioctl(self.terminal, _TIOCSWINSZ, struct.pack("4H", *self.size, 0, 0))

    def write(self) -> bool:
        """Write pending input; False when the stream is to be closed, at its end or because nobody reads it."""
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
