"""Whether the machine answers. Each `PERIOD` seconds it is asked for a sign, as long as insulad wants to know.

insulad is told what is known when it asks, and each change. A machine that stands still on purpose is not asked.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from insula.kernel.event_loop import EventLoop
    from insula.machine.shim.connection import ShimConnection

PERIOD = 10.0
LATE = 5.0
"""Seconds after which a machine does not answer."""
_PUNCTUAL = 1.0
"""Seconds that a timer may be late. If it is later, this process stood still, as while it is paused."""


class Answers:
    """Asks by `ask`, which calls back with an answer. `stands_still` tells that the machine can't answer now."""

    def __init__(
        self,
        loop: EventLoop,
        ask: Callable[[Callable[[], object]], object],
        stands_still: Callable[[], bool],
    ) -> None:
        self._loop, self._ask, self._stands_still = loop, ask, stands_still
        self._listeners: list[ShimConnection] = []
        self._answers = True
        self._asked = 0  # how often
        self._waits = False  # for an answer, or for the next question

    def listen(self, connection: ShimConnection) -> None:
        """Tell a connection, from now on until it is closed there."""
        self._listeners.append(connection)
        connection.tell({"answers": self._answers})
        if not self._waits:
            self._waits = True
            self._loop.later(PERIOD, self._question)

    def forget(self, connection: ShimConnection) -> None:
        if connection in self._listeners:
            self._listeners.remove(connection)

    def _question(self) -> None:
        self._waits = bool(self._listeners)
        if not self._waits:
            return
        if self._stands_still():
            self._loop.later(PERIOD, self._question)
            return
        self._asked += 1
        number = self._asked

        def answered() -> None:
            if number == self._asked:
                self._asked += 1
                self._now(answers=True)
                self._loop.later(PERIOD, self._question)

        self._ask(answered)
        self._expect(number)

    def _expect(self, number: int) -> None:
        """Wait for an answer: if it is late, that is told once, and it is waited for all the same."""
        due = time.monotonic() + LATE

        def late() -> None:
            if number != self._asked:
                return
            if self._stands_still() or time.monotonic() > due + _PUNCTUAL:
                self._expect(number)
            else:
                self._now(answers=False)

        self._loop.later(LATE, late)

    def _now(self, *, answers: bool) -> None:
        if answers != self._answers:
            self._answers = answers
            for each in self._listeners:
                each.tell({"answers": answers})
