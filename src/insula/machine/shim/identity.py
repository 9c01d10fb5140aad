"""The identity of a machine, which it is given at its start and whenever it stood still: its name, a random number that
it has to answer with (`generation`), fresh random numbers, and the time."""

from __future__ import annotations

import os
import time

from insula.machine.protocol import VERSION
from insula.machine.shim.qmp import QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from insula.machine.shim.agent import AgentConnection
    from insula.machine.shim.changes import Answer, Done

    class IdentifiedAgent(Protocol):
        """What takes an identity while there are programs, with an answer."""

        def ask(self, verb: str, arguments: dict[str, Any], answered: Done, *, now: bool = False) -> object: ...


_SEED = 64
_SKEW, _TRIES = 0.05, 5
"""The clock is set to the moment at which the request was sent. If the answer takes longer than so many seconds, that
is the past, and it is set again, so many times at most."""


class MachineIdentity:
    """What a machine is given. `given` has what stays the same: `hostname` and `generation`."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    @property
    def generation(self) -> str:
        return str(self._given["generation"])

    def renew(self, generation: str) -> None:
        """Have another number from now on."""
        self._given["generation"] = generation

    def give(self, agent: AgentConnection) -> None:
        """Give it before there are programs. QmpError if the machine answers with another one: it may be the copy of a
        copy. AgentError."""
        for _ in range(_TRIES):
            sent = time.monotonic()
            answer = agent.request("identity", **self._now())
            if answer.get("generation") != self.generation:
                raise QmpError("the machine did not take its identity")
            if answer.get("version") != VERSION:
                raise QmpError("the snapshot is of another version of Insula, whose agent does not understand this one")
            if time.monotonic() - sent <= _SKEW:
                return

    def ask(self, agent: IdentifiedAgent, answered: Done, *, now: bool = False, tries: int = _TRIES) -> None:
        """Give it while there are programs, with `now` also while frames are held. `answered` gets the answer."""
        sent = time.monotonic()

        def receive(answer: Answer) -> None:
            if tries > 1 and "error" not in answer and time.monotonic() - sent > _SKEW:
                self.ask(agent, answered, now=now, tries=tries - 1)
            else:
                answered(answer)

        agent.ask("identity", self._now(), receive, now=now)

    def _now(self) -> dict[str, Any]:
        return {**self._given, "seed": os.urandom(_SEED).hex(), "time": time.time_ns()}
