"""A machine that leaves for another host while it runs; the other side is arrival.py there.

insulad asks for it over the shim's socket, and gives descriptors: of a connection to the NBD server of the other QEMU
for each disk, and of one that takes the memory. From then on the shim tells how far it is, in messages on the same
connection:

    QEMU copies the disks                                                        → copied
    the agent keeps frames back, so that nothing is on its way; QEMU sends the memory
    QEMU has stopped the machine and sent all of it                              → sent: sessions of the agent
                                           ← end: it runs there, and this side ends
                                           ← back: it does not, and goes on here

Until `sent` the machine goes on here if anything fails, also if the connection ends. From then on it stands still until
it is told what to do, since it may run at the other host: on the same connection, or on another one if insulad was
killed.
"""

from __future__ import annotations

import contextlib
import os
import time

from insula.machine.qemu import migration
from insula.machine.shim.qmp import Qmp, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Literal

    from insula.kernel.event_loop import EventLoop
    from insula.machine.shim.agent import AgentConnection
    from insula.machine.shim.connection import ShimConnection
    from insula.machine.shim.identity import MachineIdentity

    Phase = Literal["disks", "hold", "memory", "last", "state", "sent", "giving up", "going on", "over"]

_SOON = 0.002
_MORE = {2.0: 200, 5.0: 1000, 20.0: 10_000}
"""Milliseconds that a machine which writes fast may stand still at the end, by the seconds that its memory was sent."""
_SAID = b"the machine goes on at another host\n"


class Departure:
    """Sends a machine away. The `descriptors` are for its disks, which have these `nodes`, and its memory, and are
    closed. `ended` is called when the machine goes on here, `gone` when it runs elsewhere."""

    def __init__(
        self,
        connection: ShimConnection,
        nodes: Sequence[str],
        descriptors: list[int],
        loop: EventLoop,
        qmp: Qmp,
        agent: AgentConnection,
        identity: MachineIdentity,
        ended: Callable[[], object],
        gone: Callable[[], object],
    ) -> None:
        self._connection = connection
        self._nodes = nodes
        *self._disks, self._memory = descriptors
        self._loop, self._qmp, self._agent = loop, qmp, agent
        self._identity, self._ended, self._gone = identity, ended, gone
        self._error = ""
        self._more = dict(_MORE)
        self._sending = 0.0  # since when the memory is sent
        self._still = 0.0  # since when the machine stands still
        self.phase: Phase = "disks"

    def begin(self) -> None:
        """Begin with the disks."""
        self._connection.watch(self._on_message)
        try:
            for node, fd in zip(self._nodes, self._disks, strict=True):
                migration.copy_disk(self._qmp, node, fd)
        except QmpError as error:
            self._give_up(str(error))
        self._look()

    def answer_to(self, connection: ShimConnection) -> None:
        """Take messages from another connection, and from no other one any more."""
        self._connection.close()
        self._connection = connection
        connection.watch(self._on_message)

    # -- what insulad says -----------------------------------------------------------------------------------------

    def _on_message(self) -> None:
        if message := self._connection.receive():
            message.close()
            self.told(message.content)
            return
        self._connection.close()
        if self.phase != "sent":
            self._give_up("insulad has gone")

    def told(self, message: dict[str, Any]) -> None:
        """Do what is decided when all was sent; before that, anything ends it."""
        if self.phase == "sent" and "end" in message:
            self.phase = "over"
            self._connection.tell({"ended": True})
            os.write(2, _SAID)
            self._loop.later(_SOON, self._leave)
        elif "back" in message:
            self._give_up("the other host does not take it")
        else:
            self._connection.reply({"error": "it was not sent"})

    def _leave(self) -> None:
        """End, when what the machine has said before is written."""
        if self._agent.is_idle:
            self._gone()
        else:
            self._loop.later(_SOON, self._leave)

    # -- what QEMU does --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Look whether a step is done, and take the next one."""
        try:
            self._step()
        except QmpError as error:
            self._give_up(str(error))
        if self.phase not in ("hold", "sent", "going on", "over"):
            self._loop.later(_SOON, self._look)

    def _step(self) -> None:
        match self.phase:
            case "disks" if migration.are_copied(self._qmp, self._nodes):
                self._connection.tell({"copied": True})
                self.phase = "hold"
                self._agent.ask("hold", {}, self._on_held)
                self._agent.hold()
            case "memory":
                if migration.status(self._qmp) == "pre-switchover":
                    self._still = time.monotonic()
                    migration.end_copies(self._qmp)
                    self.phase = "last"
                else:
                    self._be_patient()
            case "last" if migration.have_ended(self._qmp):
                migration.hand_over(self._qmp)
                self.phase = "state"
            case "state" if migration.status(self._qmp) == "completed":
                self.phase = "sent"
                self._close()
                self._connection.tell({"sent": {**self._agent.numbers, "still": self._still}})
            case "giving up" if migration.is_over(self._qmp):
                self.phase = "going on"
                migration.go_on(self._qmp, self._nodes)
                self._identity.ask(self._agent, lambda _: self._thaw(), now=True)  # the machine may have stood still

    def _be_patient(self) -> None:
        sending = time.monotonic() - self._sending
        for seconds in [each for each in self._more if each < sending]:
            migration.allow_more(self._qmp, self._more.pop(seconds))

    def _on_held(self, answer: dict[str, Any]) -> None:
        """Nothing is on its way between host and guest."""
        if self.phase != "hold":
            return
        self.phase = "memory"
        try:
            if "step" in answer:
                raise QmpError(f"its agent can't be held: {answer.get('error')}")
            migration.send_memory(self._qmp, self._memory)
            self._close()
            self._sending = time.monotonic()
        except QmpError as error:
            self._give_up(str(error))
        self._look()

    # -- if it fails -----------------------------------------------------------------------------------------------

    def _give_up(self, error: str) -> None:
        """Have QEMU end what it does, and the machine go on here."""
        if self.phase in ("giving up", "going on", "over"):
            self._error = self._error or error
            return
        waits = self.phase in ("hold", "sent")
        self.phase, self._error = "giving up", error
        self._close()
        with contextlib.suppress(QmpError):  # it is asked again
            migration.give_up(self._qmp)
        if waits:
            self._look()

    def _thaw(self) -> None:
        """Release its frames."""
        self._agent.ask("thaw", {}, self._on_thawed, now=True)

    def _on_thawed(self, _: dict[str, Any]) -> None:
        self._agent.release()
        self.phase = "over"
        self._connection.reply({"error": self._error})
        self._ended()

    def _close(self) -> None:
        """Close our copies of the descriptors: who reads from their other ends waits for that."""
        for fd in (*self._disks, self._memory):
            if fd >= 0:
                os.close(fd)
        self._disks, self._memory = [], -1
