"""The agent of QEMU in a guest (qemu-ga), if there is one: JSON lines over a virtio-serial port.

It is never needed, and what it says is a guest's word. Each command begins with `guest-sync-delimited`, so that nothing
is taken for its answer that was sent before; it has a time limit, and a line a size limit. An agent that does not
answer is left alone for `QUIET` seconds. Between commands nothing is read: a guest that sends more is stopped by QEMU.
"""

from __future__ import annotations

import os
import time
from collections import deque

from insula.kernel.event_loop import EventLoop
from insula.model.cpython import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from insula.model.cpython import socket

    Answered = Callable[[dict[str, Any]], object]

DEADLINE = 5.0
FREEZE = 20.0
"""Seconds to freeze file systems, which write first what is to be written."""
QUIET = 60.0
MAX_LINE = 256 << 10
_CLAIMS = ("guest-get-host-name", "guest-get-osinfo", "guest-network-get-interfaces")
_MOST_CLAIMED = 20 << 10
"""Bytes of each answer that are passed on to insulad."""
_TRIES = 12  # to thaw file systems
_LATE = {"error": "the agent does not answer"}
_TIMES = 5  # to tell the time
_DELIMITER = b"\xff"  # in no text of UTF-8


class AgentCommand:
    """A command, and who gets its answer: with `return` or `error`."""

    def __init__(self, name: str, arguments: dict[str, Any], answered: Answered, seconds: float) -> None:
        self.name, self.arguments, self.answered, self.seconds = name, arguments, answered, seconds
        self.sync = int.from_bytes(os.urandom(4), "big") >> 1
        self.synced = False


class GuestAgent:
    """The agent at the other end of a socket. `is_open` tells whether a program in the guest has its port open."""

    def __init__(self, sock: socket.socket, loop: EventLoop, is_open: Callable[[], bool]) -> None:
        self._socket, self._loop, self._is_open = sock, loop, is_open
        self._waiting: deque[AgentCommand] = deque()  # the first one is being answered
        self._buffer = b""
        self._quiet = 0.0  # until then it is left alone
        sock.setblocking(False)

    def ask(self, name: str, arguments: dict[str, Any], answered: Answered, seconds: float = DEADLINE) -> None:
        """Have a command executed, after those before; `answered` is called with its answer in any case, later."""
        self._waiting.append(AgentCommand(name, arguments, answered, seconds))
        if len(self._waiting) == 1:
            self._loop.later(0.0, self._begin)

    def insist(self, name: str, answered: Answered, tries: int = _TRIES) -> None:
        """Have a command executed also if the agent has not answered lately, and again until it does; `answered` is
        called after the first time."""

        def once(answer: dict[str, Any]) -> None:
            if "error" in answer and tries > 1:
                self.insist(name, lambda _: None, tries - 1)
            answered(answer)

        self._quiet = 0.0
        self.ask(name, {}, once)

    def when_heard(self, action: Callable[[], object]) -> None:
        """Do something when it is not left alone any more, if it has not answered just now."""
        self._loop.later(QUIET + 1, action)

    def _begin(self) -> None:
        command = self._waiting[0]
        if time.monotonic() < self._quiet:
            self._finish(command, _LATE)
            return
        if not self._is_open():
            self._finish(command, {"error": "there is no agent"})
            return
        self._buffer = b""
        self._loop.watch(self._socket.fileno(), lambda _: self._on_data(command))
        self._loop.later(command.seconds, lambda: self._on_late(command))
        self._send(command, "guest-sync-delimited", {"id": command.sync})

    def _send(self, command: AgentCommand, name: str, arguments: dict[str, Any]) -> None:
        line = dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
        try:
            sent = self._socket.send(line)
        except OSError:
            sent = 0
        if sent < len(line):
            self._on_late(command)

    def _on_data(self, command: AgentCommand) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._buffer += data
        while command in self._waiting and b"\n" in self._buffer:
            line, self._buffer = self._buffer.split(b"\n", 1)
            self._on_line(command, line)
        if not data or len(self._buffer) > MAX_LINE:
            self._on_late(command)

    def _on_line(self, command: AgentCommand, line: bytes) -> None:
        try:
            message = loads(line.rpartition(_DELIMITER)[2].decode())
        except (ValueError, RecursionError):
            return
        if not isinstance(message, dict):
            return
        if command.synced:
            self._finish(command, message)
        elif _DELIMITER in line and message.get("return") == command.sync:
            command.synced = True
            self._send(command, command.name, command.arguments)

    def _on_late(self, command: AgentCommand) -> None:
        if command in self._waiting:
            self._quiet = time.monotonic() + QUIET
            self._finish(command, _LATE)

    def _finish(self, command: AgentCommand, answer: dict[str, Any]) -> None:
        self._waiting.remove(command)
        self._loop.unwatch(self._socket.fileno())
        if self._waiting:
            self._loop.later(0.0, self._begin)
        command.answered(answer)


def ask_claims(agent: GuestAgent, done: Answered) -> None:
    """Ask what the guest is; `done` gets what it returns, by the commands that it answers, if that is not too long."""
    found: dict[str, Any] = {}

    def asked(name: str) -> Answered:
        def answered(answer: dict[str, Any]) -> None:
            if "return" in answer and len(dumps(answer["return"])) <= _MOST_CLAIMED:
                found[name] = answer["return"]
            if name == _CLAIMS[-1]:
                done(found)

        return answered

    for each in _CLAIMS:
        agent.ask(each, {}, asked(each))


class GuestAtMoment:
    """What a machine that stands still (moment.py) asks of its agent. With `freeze` its file systems are flushed and
    frozen before. That is for the disk alone: memory of that moment would have them frozen for ever."""

    def __init__(self, agent: GuestAgent, loop: EventLoop, *, freeze: bool) -> None:
        self._agent, self._loop = agent, loop
        self._freeze, self._frozen = freeze, False

    def ask(self, kind: str, _: object, answered: Answered, *, now: bool = False) -> None:
        """Freeze; or, for another identity, go on and take the time. What an agent can't do is left out."""
        if kind == "freeze" and self._freeze:
            self._frozen = True  # also if it answers too late
            self._agent.ask("guest-fsfreeze-freeze", {}, lambda _: answered({}), FREEZE)
        elif kind == "identity":
            self._thaw(lambda: set_time(self._agent, lambda: answered({})))
        else:
            self._loop.later(0.0, lambda: answered({}))

    def _thaw(self, done: Callable[[], object]) -> None:
        if not self._frozen:
            done()
            return
        self._frozen = False
        self._agent.insist("guest-fsfreeze-thaw", lambda _: done())

    def hold(self) -> None:
        """Do nothing: nothing else is on its way to it."""

    def release(self) -> None:
        """Do nothing, as above."""


def set_time(agent: GuestAgent, done: Callable[[], object], times: int = _TIMES) -> None:
    """Tell the guest the time: its clock stood still. One that is too slow to answer is told again, later."""

    def answered(answer: dict[str, Any]) -> None:
        if answer is _LATE and times > 1:
            agent.when_heard(lambda: set_time(agent, lambda: None, times - 1))
        done()

    agent.ask("guest-set-time", {"time": time.time_ns()}, answered)
