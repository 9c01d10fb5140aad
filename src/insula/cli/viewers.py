"""Viewers of a machine's screen (VNC): each program that connects to our socket is connected to the machine.

One poll(2) loop passes bytes in both directions. What one side does not take yet is kept, and no more is read for it.
"""

from __future__ import annotations

import os
import select
import socket

from insula.cli.output import warn
from insula.cli.terminal import SignalPipe
from insula.client.http import CHUNK
from insula.model.cpython import loads, signal
from insula.model.errors import InsulaError, Unavailable, from_dict
from insula.model.stream import Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from insula.client.attachment import Attachment

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENOUGH = 1 << 20  # bytes that are kept for a program that does not read


def serve(listener: socket.socket, connect: Callable[[], Attachment]) -> None:
    """Serve programs that connect to `listener`, each with a connection of its own to the machine, until a signal asks
    to end."""
    viewers: dict[int, _Viewer] = {}
    listener.setblocking(False)
    with SignalPipe(_ENDING) as signals:
        try:
            while True:
                poller = select.poll()
                poller.register(signals, select.POLLIN)
                poller.register(listener, select.POLLIN)
                for each in {*viewers.values()}:
                    each.register(poller)
                ready = {fd for fd, _ in poller.poll(0 if any(each.buffered() for each in viewers.values()) else None)}
                if signals in ready:
                    return
                for viewer in {found for fd, found in viewers.items() if fd in ready or found.buffered()}:
                    if not viewer.turn():
                        viewers = {fd: other for fd, other in viewers.items() if other is not viewer}
                if listener.fileno() in ready and (made := _accepted(listener, connect)):
                    viewers |= {made.fileno(): made, made.attachment.fileno(): made}
        finally:
            for each in {*viewers.values()}:
                each.close()


def _accepted(listener: socket.socket, connect: Callable[[], Attachment]) -> _Viewer | None:
    """The viewer that has come; None if it has gone, or if there can't be one, which is told."""
    try:
        program, _ = listener.accept()
    except OSError:
        return None
    try:
        return _Viewer(program, connect())
    except InsulaError as error:
        program.close()
        warn(f"no viewer: {error.message}; hint: {error.hint}" if error.hint else f"no viewer: {error.message}")
        return None


class _Viewer:
    def __init__(self, program: socket.socket, attachment: Attachment) -> None:
        self.program, self.attachment = program, attachment
        self._pending = bytearray()  # for the program
        self._reading = True
        program.setblocking(False)

    def fileno(self) -> int:
        return self.program.fileno()

    def buffered(self) -> bool:
        return self.attachment.buffered() and len(self._pending) < _ENOUGH

    def register(self, poller: select.poll) -> None:
        """Wait for what can be passed on."""
        read = self._reading and not self.attachment.pending
        poller.register(self.program, (select.POLLIN if read else 0) | (select.POLLOUT if self._pending else 0))
        taken = len(self._pending) < _ENOUGH
        events = (select.POLLIN if taken else 0) | (select.POLLOUT if self.attachment.pending else 0)
        poller.register(self.attachment, events)

    def turn(self) -> bool:
        """Pass on what has come; False at the end of either side, after which both are closed."""
        try:
            self._from_program()
            self.attachment.flush()
            if self._from_machine():
                return True
        except OSError:  # the program has gone
            pass
        except InsulaError as error:
            warn(f"a viewer was disconnected: {error.message}")
        self.close()
        return False

    def _from_program(self) -> None:
        """Read from the program, which may be gone. OSError."""
        if not self._reading or self.attachment.pending:
            return
        try:
            data = self.program.recv(CHUNK)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError
        self.attachment.send(Kind.STDIN, data)

    def _from_machine(self) -> bool:
        """Read from the machine, and write to the program. False at the end of the machine; InsulaError, OSError."""
        open_ = True
        for kind, payload in self.attachment.receive() if len(self._pending) < _ENOUGH else ():
            if kind is Kind.STDOUT:
                self._pending += payload
            elif kind is Kind.ERROR:
                raise from_dict(loads(payload))
            elif kind is Kind.EXIT:
                open_ = False
        try:
            while self._pending:
                del self._pending[: self.program.send(self._pending[:CHUNK], socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        return open_

    def close(self) -> None:
        self.program.close()
        self.attachment.close()


class PrivateSocket:
    """A unix socket for our user alone: at `path`, or in a new directory if there is none given. It is removed at the
    end of the block."""

    def __init__(self, path: str | None, name: str) -> None:
        self._directory: str | None = None
        if path is None:
            import tempfile

            runtime = os.environ.get("XDG_RUNTIME_DIR", "")
            self._directory = tempfile.mkdtemp(prefix="insula-", dir=runtime if os.path.isdir(runtime) else None)
            path = f"{self._directory}/{name}"
        self.path = path

    def __enter__(self) -> socket.socket:
        """Listen. Unavailable."""
        self._listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            self._listener.bind(self.path)
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            self._remove_directory()
            why = error.strerror or error  # a path that is too long has none
            raise Unavailable(f"{self.path[:200]} can't be made: {why}", "choose another path with --listen") from None
        finally:
            os.umask(before)
        return self._listener

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        if os.path.lexists(self.path):
            os.unlink(self.path)
        self._remove_directory()

    def _remove_directory(self) -> None:
        if self._directory:
            os.rmdir(self._directory)


def loopback(port: int) -> socket.socket:
    """Listen on a port of this machine's loopback address; 0 chooses one. Unavailable."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise Unavailable(f"port {port} can't be used: {error.strerror}", "choose another one") from None
    return listener
