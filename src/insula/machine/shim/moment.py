"""A moment at which a machine stands still, so that its disk can be copied, and its memory written.

insulad asks for it over the shim's socket, and gives a descriptor for the memory if that is wanted. From then on the
shim tells how far it is, in messages on the same connection:

    the agent freezes all programs, and nothing is on its way between host and guest
    QEMU stops the machine                   → stopped: what QEMU it is, what type of machine, and its devices
    QEMU writes the memory, if that is asked → saved
                                             ← go: the disk was copied
    the machine goes on, with the time and fresh random numbers, and then its programs  → running: how long they stood

The machine also goes on if the connection ends: insulad was killed, and there is no snapshot. If anything fails the
last message is `error`, when the machine goes on.

Before the machine's container is frozen, only the programs are: `frozen` is told, and that is all. The connection ends
when the container is frozen, or insulad was killed. The shim notices when it runs again, whoever has thawed it; so no
program of a machine that was paused runs with a clock of the past.
"""

from __future__ import annotations

import contextlib
import os
import time

from insula.machine.qemu import snapshot
from insula.machine.shim.qmp import Qmp, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from insula.kernel.event_loop import EventLoop
    from insula.machine.shim.connection import ShimConnection
    from insula.machine.shim.identity import IdentifiedAgent, MachineIdentity

    class AgentAtMoment(IdentifiedAgent, Protocol):
        """What is asked of an agent: to freeze, to take an identity, and to thaw."""

        def hold(self) -> None: ...
        def release(self) -> None: ...


_SOON = 0.002
_LONGEST = 900.0
"""Seconds after which the machine goes on in any case."""


class StandStill:
    """Holds a machine still. `memory` is a descriptor to write the memory to, which is closed; -1 for none. `devices`
    is what another machine with that memory must have. `ended` is called when the machine goes on. If it does not
    `stop`, only its programs are held."""

    def __init__(
        self,
        connection: ShimConnection,
        memory: int,
        loop: EventLoop,
        qmp: Qmp,
        agent: AgentAtMoment,
        identity: MachineIdentity,
        devices: dict[str, Any],
        ended: Callable[[], object],
        *,
        stop: bool = True,
    ) -> None:
        self._connection, self._memory = connection, memory
        self._loop, self._qmp, self._agent = loop, qmp, agent
        self._identity, self._devices, self._ended = identity, devices, ended
        self._began = time.monotonic()
        self._error: str | None = None
        self._stop = stop
        self._frozen = False  # its programs are
        self._still = False  # QEMU has stopped the machine
        self._saving = False
        self._over = False  # it goes on, or is about to

    def begin(self) -> None:
        """Have the agent freeze the programs. Nothing else is sent to it from now on."""
        self._connection.watch(self._on_message)
        self._agent.ask("freeze", {}, self._on_frozen)
        self._agent.hold()
        self._loop.later(_LONGEST, lambda: self._finish("it takes too long"))

    def _on_frozen(self, answer: dict[str, Any]) -> None:
        if "step" in answer:
            self._agent.release()
            self._over = True
            self._conclude({"error": f"its programs can't be stopped: {answer.get('error')}"})
            return
        if self._over:  # insulad has gone meanwhile
            self._go_on()
            return
        self._frozen = True
        if not self._stop:
            self._connection.tell({"frozen": True})
            return
        try:
            self._qmp.execute("stop")
            self._still = True
            self._connection.tell({"stopped": {**snapshot.describe(self._qmp), **self._devices}})
            if self._memory >= 0:
                snapshot.begin_to_save(self._qmp, self._memory)
                self._saving = True
                self._close()
                self._look()
        except QmpError as error:
            self._finish(str(error))

    def _look(self) -> None:
        """Look whether the memory is written."""
        if not self._saving:
            return
        try:
            if not snapshot.saved(self._qmp):
                self._loop.later(_SOON, self._look)
                return
        except QmpError as error:
            self._saving = False
            self._go_on() if self._over else self._finish(str(error))
            return
        self._saving = False
        if self._over:
            self._go_on()
        else:
            self._connection.tell({"saved": True})

    def _on_message(self) -> None:
        message = self._connection.receive()
        if message is None:
            self._connection.close()
            self._finish("insulad has gone")
            return
        message.close()
        if "go" in message.content:
            self._finish(None if not self._saving else "it was told to go on too early")

    def _finish(self, error: str | None) -> None:
        """Let the machine go on, as soon as QEMU does not write its memory any more."""
        if self._over:
            return
        self._over, self._error = True, error
        if self._saving:
            with contextlib.suppress(QmpError):
                self._qmp.execute("migrate_cancel")  # `_look` notices
        elif self._frozen:
            self._go_on()

    def _close(self) -> None:
        """Close the descriptor for the memory: who reads from the other end waits for that."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _go_on(self) -> None:
        self._close()
        if self._still:
            try:
                self._qmp.execute("cont")
            except QmpError as error:
                self._error = str(error)
        self._identity.ask(self._agent, lambda _: self._thaw(), now=True)  # its clock stood still

    def _thaw(self) -> None:
        """Let its programs go on."""
        self._agent.ask("thaw", {}, self._on_thawed, now=True)

    def _on_thawed(self, _: dict[str, Any]) -> None:
        self._agent.release()
        stood = time.monotonic() - self._began
        self._conclude({"error": self._error} if self._error else {"running": stood})

    def _conclude(self, message: dict[str, Any]) -> None:
        self._close()
        self._connection.reply(message)
        self._ended()
