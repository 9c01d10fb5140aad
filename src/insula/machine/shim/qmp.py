"""Commands to QEMU: the QEMU Machine Protocol, JSON lines over a socket (docs/interop/qmp-spec.rst of QEMU).

Each command has an answer, and events come between. QEMU runs a stranger's machine, and may be in the stranger's hands:
it gets `DEADLINE` seconds for each answer, and a line has at most `MAX_LINE` bytes. Each command has a number, so that
an answer that comes too late is not taken for that to the next one.
"""

from __future__ import annotations

import contextlib
import select
import struct
import time

from insula.model.cpython import dumps, loads, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

DEADLINE = 30.0
MAX_LINE = 1 << 20


class QmpError(Exception):
    """A command that QEMU has refused, or has not answered."""


class Qmp:
    """A monitor of QEMU, at our end of a pair of sockets."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = b""
        self._number = 0
        self._deadline = DEADLINE
        self.events: list[dict[str, Any]] = []
        self._line(time.monotonic() + DEADLINE)  # the greeting
        self.execute("qmp_capabilities")

    def fileno(self) -> int:
        return self._socket.fileno()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a command and return what it returns. Events that come before are kept. QmpError."""
        return self._execute(command, arguments)

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Give QEMU so many seconds for each answer meanwhile."""
        before, self._deadline = self._deadline, seconds
        try:
            yield
        finally:
            self._deadline = before

    def give(self, name: str, fd: int) -> None:
        """Give QEMU a copy of a descriptor, which later commands name (`getfd`). QmpError."""
        self._execute("getfd", {"fdname": name}, [fd])

    def add(self, number: int, fd: int) -> None:
        """Give QEMU a copy of a descriptor as /dev/fdset/`number` (`add-fd`). QmpError."""
        self._execute("add-fd", {"fdset-id": number}, [fd])

    def drain(self) -> None:
        """Read events that have come, and drop them. QmpError if QEMU has ended."""
        self._line(time.monotonic() + DEADLINE)
        while b"\n" in self._buffer:
            self._line(0.0)
        self.events.clear()

    def _execute(self, command: str, arguments: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
        rights = struct.pack(f"{len(descriptors)}i", *descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
        self._number += 1
        line = dumps({"execute": command, "arguments": arguments, "id": self._number}).encode() + b"\n"
        self._socket.sendmsg([line], ancillary)
        end = time.monotonic() + self._deadline
        while True:
            message = self._line(end)
            if "event" in message:
                self.events.append(message)
            elif message.get("id") != self._number:
                continue
            elif "error" in message:
                raise QmpError(f"{command}: {message['error'].get('desc')}")
            elif "return" in message:
                return message["return"]

    def wait_for(self, event: str, seconds: float) -> None:
        """Wait until an event has come. QmpError after `seconds`."""
        end = time.monotonic() + seconds
        while not any(each["event"] == event for each in self.events):
            message = self._line(end)
            if "event" in message:
                self.events.append(message)

    def _line(self, end: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise QmpError("QEMU sends a line without end")
            if not select.select([self._socket], [], [], max(0.0, end - time.monotonic()))[0]:
                raise QmpError("QEMU does not answer")
            data = self._socket.recv(1 << 16)
            if not data:
                raise QmpError("QEMU has ended")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message = loads(line.decode(errors="replace"))
        if not isinstance(message, dict):
            raise QmpError("QEMU sends what is no message")
        return message
