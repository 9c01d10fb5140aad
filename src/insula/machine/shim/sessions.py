"""Conversations with the agent, over one stream of frames (`insula.machine.protocol`).

A session for a program joins three descriptors of this side with the program's streams. Output is written as it comes;
what a slow reader leaves waits here, at most a window, since more is granted only for what was written. Input is
read only while the agent has granted bytes.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import struct

from insula.kernel.event_loop import EventLoop
from insula.machine import protocol
from insula.model.cpython import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from insula.model.cpython import socket

_READ = 64 << 10
_TCGETS, _TCSETS = 0x5401, 0x5402


class AgentError(Exception):
    """The agent's refusal of a request: the message of a `StepError`."""

    def __init__(self, message: dict[str, Any]) -> None:
        self.message = message
        super().__init__(f"{message.get('step')}: {message.get('error')}")


class ProgramSession:
    """A program in the guest. `stdio` are stdin, stdout and stderr of this side; with a terminal only the first."""

    def __init__(
        self, connection: AgentConnection, number: int, stdio: list[int], ended: Callable[[Any], object]
    ) -> None:
        self.connection, self.number, self.ended = connection, number, ended
        self._loop = connection.loop
        self._stdin, self._stdout, self._stderr = (stdio * 3)[:3] if len(stdio) == 1 else stdio
        self._credit = 0
        self._waiting = {fd: bytearray() for fd in {self._stdout, self._stderr}}
        self._end: Any = None
        self._files = {fd for fd in {*stdio} if _is_always_ready(fd)}
        for fd in {*stdio}:
            os.set_blocking(fd, False)
        if len(stdio) == 1:
            _make_raw(stdio[0])

    def receive(self, kind: int, payload: bytes) -> None:
        """Do what a frame of the agent tells."""
        match kind:
            case protocol.REPLY:
                self._credit = protocol.WINDOW
            case protocol.STDOUT | protocol.STDERR:
                fd = self._stdout if kind == protocol.STDOUT else self._stderr
                self._waiting[fd] += payload
                self._write(fd)
            case protocol.GRANT:
                self._credit += protocol.NUMBER.unpack(payload)[0]
            case protocol.EXIT | protocol.ERROR:
                self._end = loads(payload.decode())
        self._watch()
        if self._end is not None and not any(self._waiting.values()):
            self._close()

    def signal(self, number: int) -> None:
        self.connection.send(self.number, protocol.SIGNAL, bytes([number]))

    def _watch(self) -> None:
        masks = {self._stdin: select.EPOLLIN if self._stdin >= 0 and self._credit > 0 else 0}
        for fd, waiting in self._waiting.items():
            masks[fd] = masks.get(fd, 0) | (select.EPOLLOUT if waiting else 0)
        for fd, mask in masks.items():
            if fd in self._files:
                while fd == self._stdin and self._credit > 0:
                    self._read()
            elif fd >= 0:
                self._loop.watch(fd, lambda events, fd=fd: self._on_ready(fd, events), mask)  # type: ignore[misc]

    def _on_ready(self, fd: int, events: int) -> None:
        if fd in self._waiting and events & ~select.EPOLLIN:
            self._write(fd)
        if fd == self._stdin and events & ~select.EPOLLOUT:
            self._read()
        self._watch()
        if self._end is not None and not any(self._waiting.values()):
            self._close()

    def _read(self) -> None:
        try:
            data = os.read(self._stdin, min(protocol.CHUNK, self._credit))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._credit -= len(data)
            self.connection.send(self.number, protocol.STDIN, data)
        else:
            if self._stdin not in self._waiting:
                self._loop.unwatch(self._stdin)
            self._stdin = -1
            self.connection.send(self.number, protocol.STDIN_EOF)

    def _write(self, fd: int) -> None:
        waiting = self._waiting[fd]
        written = 0
        try:
            while waiting:
                count = os.write(fd, waiting[: protocol.CHUNK])
                del waiting[:count]
                written += count
        except BlockingIOError:
            pass
        except OSError:  # nobody reads it
            written += len(waiting)
            waiting.clear()
        if written:
            self.connection.send(self.number, protocol.GRANT, protocol.NUMBER.pack(written))

    def _close(self) -> None:
        end, self._end = self._end, None
        for fd in {self._stdin, *self._waiting} - {-1}:
            self._loop.unwatch(fd)
        self.connection.forget(self.number)
        self.ended(end)


def _is_always_ready(fd: int) -> bool:
    """Whether it is a regular file, or a device such as /dev/null: epoll refuses these (EPERM, epoll_ctl(2))."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(fd))


def _make_raw(terminal: int) -> None:
    """Have a terminal pass everything on: lines, echo and signals are the terminal's in the guest (termios(3))."""
    mode = bytearray(fcntl.ioctl(terminal, _TCGETS, bytes(64)))
    struct.pack_into("4I", mode, 0, 0, 0, struct.unpack_from("I", mode, 8)[0], 0)
    fcntl.ioctl(terminal, _TCSETS, bytes(mode))


class AgentConnection:
    """The stream of frames to and from the agent, at our end of a pair of sockets."""

    def __init__(self, sock: socket.socket, loop: EventLoop, lost: Callable[[], object]) -> None:
        self.loop = loop
        self._socket = sock
        self._lost = lost
        self._decoder = protocol.FrameDecoder()
        self._waiting = bytearray()
        self._number = 0
        self._sessions: dict[int, ProgramSession] = {}

    def request(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Ask for something, and wait for the answer: before there are programs. AgentError."""
        number = self._send_request(verb, arguments)
        while True:
            for session, kind, payload in self._receive():
                if session != number or kind not in (protocol.REPLY, protocol.ERROR):
                    continue
                answer = loads(payload.decode())
                if kind == protocol.ERROR:
                    raise AgentError(answer)
                return dict(answer)

    def run(
        self, verb: str, arguments: dict[str, Any], stdio: list[int], ended: Callable[[Any], object]
    ) -> ProgramSession:
        """Have a program run; `ended` is called with how it ended."""
        number = self._send_request(verb, arguments)
        session = self._sessions[number] = ProgramSession(self, number, stdio, ended)
        return session

    def turn_off(self) -> None:
        """Have the machine write what is to be written, and turn itself off."""
        self._send_request("off", {})

    def serve(self) -> None:
        """From here on frames are received by the loop."""
        os.set_blocking(self._socket.fileno(), False)
        self._watch()

    def _send_request(self, verb: str, arguments: dict[str, Any]) -> int:
        self._number += 1
        self.send(self._number, protocol.REQUEST, dumps({"verb": verb, **arguments}).encode())
        return self._number

    def send(self, session: int, kind: int, payload: bytes = b"") -> None:
        self._waiting += protocol.encode(session, kind, payload)
        self._flush()

    def forget(self, session: int) -> None:
        self._sessions.pop(session, None)

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._socket.send(self._waiting)]
        except BlockingIOError:
            self._watch()

    def _watch(self) -> None:
        mask = select.EPOLLIN | (select.EPOLLOUT if self._waiting else 0)
        self.loop.watch(self._socket.fileno(), self._on_ready, mask)

    def _on_ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
            self._watch()
        if events & ~select.EPOLLOUT:
            for number, kind, payload in self._receive():
                if session := self._sessions.get(number):
                    session.receive(kind, payload)

    def _receive(self) -> list[tuple[int, int, bytes]]:
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.loop.unwatch(self._socket.fileno())
            self._lost()
            return []
        return list(self._decoder.feed(data))
