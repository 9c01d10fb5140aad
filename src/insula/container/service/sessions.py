"""The zygote's copies of the streams of all containers, and their transfer to the monitor.

Each pipe or terminal is open in two processes, so that either may die: in the zygote, which made it, and in the
monitor, which relays it. When one of them is started again, it gets all streams from the other.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

from insula.container import wire
from insula.container.service.run_directory import Launch, ProcessKey


class SessionStreams(NamedTuple):
    """The streams of one process, by name, and the message that tells the monitor of them."""

    message: wire.Message
    streams: dict[str, int]


class Sessions:
    """All open sessions, and the channel to the monitor if there is one."""

    def __init__(self) -> None:
        self.monitor: socket.socket | None = None
        self._sessions: dict[ProcessKey, SessionStreams] = {}
        self._waiting: dict[ProcessKey, list[Callable[[], object]]] = {}

    def serve(self, monitor: socket.socket) -> None:
        """Take note of the monitor's channel, and send it all sessions."""
        self.monitor = monitor
        for session in self._sessions.values():
            self._hand_over(session)

    def open(
        self, container: str, exec_id: str | None, request: Launch, streams: dict[str, int], *, terminal: bool
    ) -> None:
        """Add the session of a new process, and send it to the monitor."""
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
        session = self._sessions[(container, exec_id)] = SessionStreams(message, streams)
        self._hand_over(session)

    def when_closed(self, key: ProcessKey, action: Callable[[], object]) -> None:
        """Call `action` when the monitor is done with all that the process printed: at once if it is so already."""
        if key in self._sessions:
            self._waiting.setdefault(key, []).append(action)
        else:
            action()

    def add(self, key: ProcessKey, streams: dict[str, int]) -> None:
        """Add streams to the session of a process; they are closed if there is none."""
        session = self._sessions.get(key)
        if session is None:
            for fd in streams.values():
                os.close(fd)
            return
        session.streams.update(streams)
        self._hand_over(session)

    def _hand_over(self, session: SessionStreams) -> None:
        """Send the monitor a session with its streams. Without a monitor the next one gets it (`serve`)."""
        if self.monitor is None:
            return
        message = {**session.message, "streams": list(session.streams)}
        try:
            wire.send(self.monitor, message, list(session.streams.values()))
        except OSError:
            self.monitor = None

    def hold(self, message: wire.Message, descriptors: list[int]) -> None:
        """Take a session with copies of its streams from the monitor, after a restart of the zygote."""
        origin = {name: message[name] for name in ("id", "exec", "tty", "stdin", "log", "log_size", "log_files")}
        streams = dict(zip(message["streams"], descriptors, strict=True))
        self._sessions[(message["id"], message["exec"])] = SessionStreams({"op": "session", **origin}, streams)

    def end(self, key: ProcessKey) -> None:
        """Tell the monitor that the process ended. A session without streams is closed at once."""
        session = self._sessions.get(key)
        if session and not session.streams:
            self._remove(key)
        if session and self.monitor:
            with contextlib.suppress(OSError):
                wire.send(self.monitor, {"op": "ended", "id": key[0], "exec": key[1]})

    def close(self, key: ProcessKey, name: str | None) -> None:
        """Close a stream, or for None the session: the monitor has read all of it."""
        session = self._sessions.get(key)
        if session is None:
            return
        for stream in [name] if name else list(session.streams):
            if (fd := session.streams.pop(stream, None)) is not None:
                os.close(fd)
        if name is None:
            self._remove(key)

    def _remove(self, key: ProcessKey) -> None:
        del self._sessions[key]
        for action in self._waiting.pop(key, ()):
            action()
