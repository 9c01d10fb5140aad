"""The stream of frames to and from the agent (`insula.machine.protocol`): requests, and sessions of programs
(sessions.py)."""

from __future__ import annotations

import os
import select
import struct

from insula.machine import protocol
from insula.machine.shim.sessions import ProgramSession, decoded
from insula.model.cpython import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from insula.kernel.event_loop import EventLoop

_READ = 64 << 10
_SAID = 300  # characters of an error


class AgentError(Exception):
    """The agent's refusal of a request: the message of a `StepError`."""

    def __init__(self, message: dict[str, Any]) -> None:
        self.message = message
        super().__init__(f"{message.get('step')}: {message.get('error')}"[:_SAID])


class _Question:
    """A request whose answer comes while programs run."""

    def __init__(self, connection: AgentConnection, number: int, answered: Callable[[dict[str, Any]], object]) -> None:
        self._connection, self._number, self._answered = connection, number, answered

    def receive(self, kind: int, payload: bytes) -> None:
        """Take the answer."""
        self._connection.forget(self._number)
        self._answered(decoded(payload))


class AgentConnection:
    """The stream of frames to and from the agent: at our end of a pair of sockets, or on a console. `fd` blocks until
    `serve`."""

    def __init__(
        self, fd: int, loop: EventLoop, lost: Callable[[], object], coding: protocol.Coding | None = None
    ) -> None:
        self.loop = loop
        self._fd = fd
        self._lost = lost
        self._coding = coding or protocol.PlainCoding()
        self._waiting = bytearray()
        self._held: bytearray | None = None
        self._number = 0
        self._first = 0  # the number of the first program's session
        self._sessions: dict[int, ProgramSession | _Question] = {}

    def wait_for_hello(self) -> None:
        """Wait for the first frame of the agent, which may not listen before."""
        while not any(kind == protocol.HELLO for _, kind, _ in self._receive()):
            pass

    def request(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Ask for something, and wait for the answer: before there are programs. AgentError."""
        number = self._send_request(verb, arguments)
        while True:
            for session, kind, payload in self._receive():
                if session != number or kind not in (protocol.REPLY, protocol.ERROR):
                    continue
                try:
                    answer = decoded(payload)
                except ValueError as error:
                    raise AgentError({"step": verb, "error": str(error)}) from None
                if kind == protocol.ERROR:
                    raise AgentError(answer)
                return answer

    def ask(
        self,
        verb: str,
        arguments: dict[str, Any],
        answered: Callable[[dict[str, Any]], object],
        *,
        now: bool = False,
    ) -> None:
        """Ask for something, with `now` also while frames are held; `answered` is called with the reply, or with the
        message of a `StepError`."""
        number = self._send_request(verb, arguments, now=now)
        self._sessions[number] = _Question(self, number, answered)

    def run(
        self, verb: str, arguments: dict[str, Any], stdio: list[int], ended: Callable[[Any], object]
    ) -> ProgramSession:
        """Have a program run; `ended` is called with how it ended."""
        number = self._send_request(verb, arguments)
        self._first = self._first or number
        return self._session(number, stdio, ended)

    def go_on(
        self, numbers: dict[str, int], arguments: dict[str, Any], stdio: list[int], ended: Callable[[Any], object]
    ) -> ProgramSession:
        """Have the first program go on in the session that it had at another host, as the `numbers` of there tell."""
        self._first = numbers["first"]
        self._send(self._first, "continue", arguments)
        return self._session(self._first, stdio, ended)

    def _session(self, number: int, stdio: list[int], ended: Callable[[Any], object]) -> ProgramSession:
        session = self._sessions[number] = ProgramSession(self, number, stdio, ended)
        return session

    def turn_off(self) -> None:
        """Have the machine write what is to be written, and turn itself off."""
        self._send_request("off", {})

    def serve(self) -> None:
        """From here on frames are received by the loop."""
        os.set_blocking(self._fd, False)
        self._watch()

    @property
    def numbers(self) -> dict[str, int]:
        """The numbers of the first program's session, and of the latest one."""
        return {"first": self._first, "last": self._number}

    def follow(self, numbers: dict[str, int]) -> None:
        """Use no session that was used at another host."""
        self._number = numbers["last"]

    @property
    def programs(self) -> dict[int, ProgramSession]:
        """The sessions of programs, but for the first."""
        found = {number: each for number, each in self._sessions.items() if isinstance(each, ProgramSession)}
        return {number: each for number, each in found.items() if number != self._first}

    @property
    def is_idle(self) -> bool:
        """Whether all output that has come is written."""
        return not any(each.has_output for each in self._sessions.values() if isinstance(each, ProgramSession))

    def _send_request(self, verb: str, arguments: dict[str, Any], *, now: bool = False) -> int:
        self._number += 1
        self._send(self._number, verb, arguments, now=now)
        return self._number

    def _send(self, number: int, verb: str, arguments: dict[str, Any], *, now: bool = False) -> None:
        self.send(number, protocol.REQUEST, dumps({"verb": verb, **arguments}).encode(), now=now)

    def send(self, session: int, kind: int, payload: bytes = b"", *, now: bool = False) -> None:
        frame = self._coding.encode(session, kind, payload)
        if self._held is not None and not now:
            self._held += frame
            return
        self._waiting += frame
        self._flush()

    def hold(self) -> None:
        """Keep frames back, until `release`: the guest is about to stand still."""
        self._held = self._held or bytearray()

    def release(self) -> None:
        """Send what was kept back."""
        held, self._held = self._held or bytearray(), None
        self._waiting += held
        self._flush()

    def forget(self, session: int) -> None:
        self._sessions.pop(session, None)

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._fd, self._waiting)]
        except BlockingIOError:
            self._watch()

    def _watch(self) -> None:
        mask = select.EPOLLIN | (select.EPOLLOUT if self._waiting else 0)
        self.loop.watch(self._fd, self._on_ready, mask)

    def _on_ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
            self._watch()
        if events & ~select.EPOLLOUT:
            for number, kind, payload in self._receive():
                if session := self._sessions.get(number):
                    try:
                        session.receive(kind, payload)
                    except (ValueError, struct.error) as error:
                        self._refuse(error)
                        return

    def _receive(self) -> list[tuple[int, int, bytes]]:
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.loop.unwatch(self._fd)
            self._lost()
            return []
        try:
            return list(self._coding.feed(data))
        except ValueError as error:
            self._refuse(error)
            return []

    def _refuse(self, error: Exception) -> None:
        """End the machine, which has sent what can't be understood."""
        os.write(2, f"the machine is ended: {error}\n".encode())
        self._lost()
