"""Changes of a machine that runs: each has one answer, and the agent is asked until the guest has found the device."""

from __future__ import annotations

import time

from insula.machine.shim.agent import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final, Protocol

    from insula.kernel.event_loop import EventLoop

    Answer = dict[str, Any]
    Done = Callable[[Answer], object]

    class AskedAgent(Protocol):
        """What is asked of an agent: with an answer later, or at once."""

        def ask(self, verb: str, arguments: dict[str, Any], answered: Done) -> object: ...
        def request(self, verb: str, **arguments: Any) -> object: ...


APPEARS = 10.0
"""Seconds until the guest must have found and configured a device."""
ANSWERS = 8.0
"""Seconds for each answer of QEMU."""
SOON = 0.01
SILENT: Final[Answer] = {"error": "the guest does not answer"}
_ENODEV = 19


class MachineChanges:
    """The changes that are on their way, and how the agent is asked for its part in them."""

    def __init__(self, agent: AskedAgent, loop: EventLoop) -> None:
        self.agent, self.loop = agent, loop
        self._number = 0

    @property
    def are_pending(self) -> bool:
        return self._number > 0

    def begin(self, done: Done) -> Done:
        """Count a change until it has its answer, which is passed on. It must have exactly one."""
        self._number += 1

        def end(answer: Answer) -> None:
            self._number -= 1
            done(answer)

        return end

    def first(self, done: Done, seconds: float, late: Answer = SILENT) -> Done:
        """Pass on the first answer, and no other one; after so many seconds without one, that is `late`."""
        told = False

        def tell(answer: Answer) -> None:
            nonlocal told
            if not told:
                told = True
                done(answer)

        self.loop.later(seconds, lambda: tell(late))
        return tell

    def ask(self, verb: str, arguments: dict[str, Any], answered: Done) -> None:
        """Ask the agent for what it can do when a device is there: again while it is not, for `APPEARS` seconds."""
        end = time.monotonic() + APPEARS

        def ask() -> None:
            self.agent.ask(verb, arguments, receive)

        def receive(answer: Answer) -> None:
            if answer.get("errno") == _ENODEV and time.monotonic() < end:
                self.loop.later(SOON, ask)
            else:
                answered(answer)

        ask()

    def request(self, verb: str, **arguments: Any) -> None:
        """The same, and wait for it: before there are programs. AgentError."""
        end = time.monotonic() + APPEARS
        while True:
            try:
                self.agent.request(verb, **arguments)
                return
            except AgentError as error:
                if error.message.get("errno") != _ENODEV or time.monotonic() > end:
                    raise
            time.sleep(SOON)
