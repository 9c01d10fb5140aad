"""The streams of all containers, in the zygote's hands and on their way to the monitor's.

Each end of a pipe or terminal is open in two processes, so that either may die: the monitor, which relays what comes,
and the zygote, which made it and only holds on to it. Who is started anew gets everything from the other.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

from insula.container import wire
from insula.container.service.run_directory import Launch

Key = tuple[str, str | None]
"""Container, and exec id or None for its first process."""


class Session(NamedTuple):
    """The streams of one process, kept here too so that they survive the monitor."""

    message: wire.Message
    streams: dict[str, int]


class Sessions:
    """What is open, and the monitor's channel if there is a monitor."""

    def __init__(self) -> None:
        self.monitor: socket.socket | None = None
        self._sessions: dict[Key, Session] = {}
        self._waiting: dict[Key, list[Callable[[], object]]] = {}

    def serve(self, monitor: socket.socket) -> None:
        """From now on this is the monitor: it gets all that there is."""
        self.monitor = monitor
        for session in self._sessions.values():
            self._hand_over(session)

    def open(
        self, container: str, exec_id: str | None, request: Launch, streams: dict[str, int], *, terminal: bool
    ) -> None:
        """A process was made, with these ends of its streams."""
        message = {
            "op": "session",
            "id": container,
            "exec": exec_id,
            "tty": terminal,
            "stdin": request.stdin,
            "log": request.log,
            "log_size": request.log_size,
            "log_files": request.log_files,
        }
        session = self._sessions[(container, exec_id)] = Session(message, streams)
        self._hand_over(session)

    def when_closed(self, key: Key, action: Callable[[], object]) -> None:
        """Call `action` when the monitor is done with all that the process printed: at once if it is so already."""
        if key in self._sessions:
            self._waiting.setdefault(key, []).append(action)
        else:
            action()

    def add(self, key: Key, streams: dict[str, int]) -> None:
        """More streams of a process."""
        session = self._sessions.get(key)
        if session is None:
            for fd in streams.values():
                os.close(fd)
            return
        session.streams.update(streams)
        self._hand_over(session)

    def _hand_over(self, session: Session) -> None:
        """Send the monitor a session, or its streams anew; without a monitor they wait here for the next."""
        if self.monitor is None:
            return
        message = {**session.message, "streams": list(session.streams)}
        try:
            wire.send(self.monitor, message, list(session.streams.values()))
        except OSError:
            self.monitor = None

    def hold(self, message: wire.Message, descriptors: list[int]) -> None:
        """Take copies of what the monitor relays: the zygote before this one has died."""
        origin = {name: message[name] for name in ("id", "exec", "tty", "stdin", "log", "log_size", "log_files")}
        streams = dict(zip(message["streams"], descriptors, strict=True))
        self._sessions[(message["id"], message["exec"])] = Session({"op": "session", **origin}, streams)

    def end(self, key: Key) -> None:
        """The process ended; if it never had a stream, nobody will read the end of one."""
        session = self._sessions.get(key)
        if session and not session.streams:
            self._remove(key)
        if session and self.monitor:
            with contextlib.suppress(OSError):
                wire.send(self.monitor, {"op": "ended", "id": key[0], "exec": key[1]})

    def close(self, key: Key, name: str | None) -> None:
        """The monitor is done with a stream, or with the session as a whole."""
        session = self._sessions.get(key)
        if session is None:
            return
        for stream in [name] if name else list(session.streams):
            if (fd := session.streams.pop(stream, None)) is not None:
                os.close(fd)
        if name is None:
            self._remove(key)

    def _remove(self, key: Key) -> None:
        del self._sessions[key]
        for action in self._waiting.pop(key, ()):
            action()
