"""Sessions of programs with the agent, over one stream of frames (`insula.machine.protocol`).

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
from insula.kernel.terminal import make_raw
from insula.machine import protocol
from insula.machine.shim.common import RESIZED
from insula.model.cpython import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class FrameSender(Protocol):
        """The stream of frames that a session is part of."""

        @property
        def loop(self) -> EventLoop: ...
        def send(self, session: int, kind: int, payload: bytes = b"") -> None: ...
        def forget(self, session: int) -> None: ...


_TIOCGWINSZ = 0x5413


class ProgramSession:
    """A program in the guest. `stdio` are stdin, stdout and stderr of this side; with a terminal only the first."""

    def __init__(self, connection: FrameSender, number: int, stdio: list[int], ended: Callable[[Any], object]) -> None:
        self.connection, self.number, self.ended = connection, number, ended
        self._loop = connection.loop
        self._stdin, self._stdout, self._stderr = (stdio * 3)[:3] if len(stdio) == 1 else stdio
        self._credit = 0
        self._waiting = {fd: bytearray() for fd in {self._stdout, self._stderr}}
        self._end: Any = None
        self.started: Callable[[], object] = lambda: None  # called when the program is executed
        self._terminal = stdio[0] if len(stdio) == 1 else -1
        self._files = {fd for fd in {*stdio} if _is_always_ready(fd)}
        for fd in {*stdio}:
            os.set_blocking(fd, False)
        if len(stdio) == 1:
            make_raw(stdio[0])  # lines, echo and signals are the terminal's in the guest

    def receive(self, kind: int, payload: bytes) -> None:
        """Do what a frame of the agent tells."""
        match kind:
            case protocol.REPLY:
                self._credit = protocol.WINDOW
                self.resize()
                self.started()
            case protocol.STDOUT | protocol.STDERR:
                fd = self._stdout if kind == protocol.STDOUT else self._stderr
                self._waiting[fd] += payload
                if len(self._waiting[fd]) > 2 * protocol.WINDOW:
                    raise ValueError("it sends more output than it may")
                self._write(fd)
            case protocol.GRANT:
                self._credit += protocol.NUMBER.unpack(payload)[0]
            case protocol.EXIT | protocol.ERROR:
                self._end = decoded(payload)
        self._watch()
        if self._end is not None and not any(self._waiting.values()):
            self._close()

    @property
    def has_output(self) -> bool:
        """Whether some of its output was not written yet."""
        return any(self._waiting.values())

    def resize(self) -> None:
        """Tell the size of the terminal on this side (TIOCGWINSZ, ioctl_tty(2)), if there is one."""
        if self._terminal >= 0:
            rows, columns = struct.unpack_from("2H", fcntl.ioctl(self._terminal, _TIOCGWINSZ, bytes(8)))
            self.connection.send(self.number, protocol.RESIZE, protocol.SIZE.pack(rows, columns))

    def forward(self, number: int) -> None:
        """Pass a signal on; SIGWINCH tells the size of the terminal."""
        if number == RESIZED:
            self.resize()
        else:
            self.connection.send(self.number, protocol.SIGNAL, bytes([number]))

    def kill(self) -> None:
        """Kill it, and what it has started in its process group."""
        self.connection.send(self.number, protocol.SIGNAL, bytes([9, 1]))

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


def decoded(payload: bytes) -> dict[str, Any]:
    """A message of the agent, which is in the guest's hands. ValueError for what is none."""
    try:
        found = loads(payload.decode())
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("it sends what is no message")
    return found
