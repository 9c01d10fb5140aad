"""Whether a machine has its identity and its program runs. insulad asks for that, and waits until it is so."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.machine.shim.connection import ShimConnection
    from insula.machine.shim.identity import MachineIdentity


class Readiness:
    """Tells it, with the seconds of each step of the start, which began at `began` (CLOCK_MONOTONIC)."""

    def __init__(self, identity: MachineIdentity, began: float) -> None:
        self._identity, self._began = identity, began
        self._seconds: dict[str, float] = {}
        self._waiting: list[ShimConnection] = []
        self.reached = False
        self.failure: dict[str, Any] | None = None
        """Why the program can't be executed: the message of a `StepError`."""

    def did(self, step: str) -> None:
        """Record when a step of the start was done."""
        self._seconds.setdefault(step, round(time.monotonic() - self._began, 4))

    def ask(self, connection: ShimConnection) -> None:
        """Answer now, or when it is reached."""
        if self.reached:
            connection.reply(self._answer())
            return
        self._waiting.append(connection)
        if self.failure:
            connection.tell({"failed": self.failure})

    def reach(self) -> None:
        self.did("program")
        self.reached = True
        for connection in self._waiting:
            connection.reply(self._answer())
        self._waiting.clear()

    def lose(self) -> None:
        """The machine has to take on another identity."""
        self.reached = False

    def fail(self, why: dict[str, Any]) -> None:
        """Tell why the program can't be executed. Whoever has read that closes its connection."""
        self.failure = why
        for connection in self._waiting:
            connection.tell({"failed": why})

    def forget(self, connection: ShimConnection) -> bool:
        """Take note that a connection has ended, and return whether it was told of the failure."""
        if connection not in self._waiting:
            return False
        self._waiting.remove(connection)
        return self.failure is not None

    def _answer(self) -> dict[str, Any]:
        return {"generation": self._identity.generation, "began": self._began, "seconds": self._seconds}
