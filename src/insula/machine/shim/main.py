"""Process 1 of a machine's container, once it has started QEMU: have the guest's program run, and end as it does.

What to do comes as JSON, the plan, in a descriptor. Other descriptors of the container are QEMU's.
"""

from __future__ import annotations

import os

from insula.kernel.event_loop import EventLoop
from insula.machine.qemu.migration import DISK
from insula.machine.qemu.state import load
from insula.machine.shim.agent import AgentConnection, AgentError
from insula.machine.shim.arrival import Arrival
from insula.machine.shim.changes import MachineChanges
from insula.machine.shim.common import FAILED, say, status_of
from insula.machine.shim.disks import FurtherDisks
from insula.machine.shim.hotplug import NetworkDevices, only_first
from insula.machine.shim.identity import MachineIdentity
from insula.machine.shim.last_words import LastWords
from insula.machine.shim.qmp import Qmp, QmpError
from insula.machine.shim.readiness import Readiness
from insula.machine.shim.resize import GrowingMachine, MachineSize
from insula.machine.shim.sessions import ProgramSession
from insula.machine.shim.slots import Slots
from insula.machine.shim.start import StartedQemu
from insula.machine.shim.started import StartedPrograms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from insula.machine import protocol
    from insula.machine.shim.connection import ShimConnection, ShimMessage
    from insula.machine.shim.start import KeptGuest

_ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
"""Milliseconds and rounds of gratuitous ARP, QEMU's own defaults."""
_OFF = 10.0
"""Seconds after which a machine that does not turn itself off is ended."""


class Shim:
    """Serves one machine. The plan has `identity`, `network` and `program` for the agent, the size of its `disk`, its
    `memory` with `modules`, and `cpus`, the ports in its `slots` and those whose devices are `inserted`, its `further`
    disks (disks.py) and the `disks` that are to be inserted, and whether the disk is to `remove` when the program has
    ended. With `resumed` the machine goes on from a snapshot, and its program with it. With `arriving` it comes from
    another host (arrival.py)."""

    off = _OFF

    def __init__(
        self, started: StartedQemu | KeptGuest, loop: EventLoop, coding: protocol.Coding | None = None
    ) -> None:
        self.plan, self.loop = started.plan, loop
        self.pid = started.pid
        self.first: ProgramSession | None = None
        self.status = FAILED
        self.programs = StartedPrograms()
        self.arrival: Arrival | None = None
        self._started = started
        self.last_words = LastWords(started.errors, loop) if isinstance(started, StartedQemu) else None
        self.identity = MachineIdentity(self.plan["identity"])
        self.readiness = Readiness(self.identity, started.began)
        self.agent = AgentConnection(started.agent.fileno(), loop, lambda: self._on_end(), coding)
        self.qmp: Qmp
        self.changes = MachineChanges(self.agent, loop)
        self.slots: Slots
        self.devices: NetworkDevices
        self.disks: FurtherDisks
        self.size: MachineSize
        self.growing: GrowingMachine

    def start(self) -> None:
        """Have the machine run, and the program in it. QmpError, AgentError, OSError."""
        self.loop.watch(os.pidfd_open(self.pid), lambda _: self._on_end())
        resumed, state = self.plan.get("resumed", False), self.plan["state"]
        self.readiness.did("shim")
        self.qmp = self.monitor()
        self.slots = Slots(self.qmp, self.loop, self.plan["slots"])
        self.devices = NetworkDevices(self.qmp, self.changes, self.slots, self.plan["network"])
        self.disks = FurtherDisks(self.qmp, self.changes, self.slots, self.plan.get("further", {}))
        self.size = self.growing = GrowingMachine(self.qmp, self.plan, DISK, self.changes)
        self.readiness.did("qemu")
        if self.plan.get("arriving"):
            self.arrival = Arrival(self.loop, self.qmp, self.nodes, self._end_with)
            return
        if resumed:
            load(self.qmp, state)
        elif state >= 0:
            load(self.qmp, state, self.plan["disk"])
        self.readiness.did("state")
        self.begin(resumed=resumed)

    @property
    def nodes(self) -> list[str]:
        """The block nodes of the disks that it writes to: its own, and then further ones by their names."""
        return [DISK, *self.disks.nodes]

    def monitor(self) -> Qmp:
        """The connection for commands to QEMU."""
        assert isinstance(self._started, StartedQemu)
        return Qmp(self._started.qmp)

    def begin(self, *, resumed: bool = False) -> None:
        """Give the machine its identity and its network, and have the program run in it."""
        self.identity.give(self.agent)
        self.readiness.did("identity")
        self._configure(self.plan["network"])
        self._attach_disks()
        self.readiness.did("network")
        verb, program = "adopt" if resumed else "start", self.plan["program"]
        self.first = self.agent.run(verb, program, self._stdio(), self._on_first_end)
        self.first.started = self.readiness.reach
        self.agent.serve()

    def _stdio(self) -> list[int]:
        return [0] if self.plan["program"]["config"]["process"].get("terminal") else [0, 1, 2]

    def own(self, numbers: dict[str, int]) -> None:
        """Have a machine that has arrived go on, and its program with it: it is this host's from now on."""
        try:
            self.qmp.execute("cont")
            self.readiness.did("own")
            self.qmp.execute("announce-self", **_ANNOUNCE)
            self.agent.follow(numbers)
            self.identity.give(self.agent)
            routes = {"routes": self.plan["network"]["routes"]}
            self.first = self.agent.go_on(numbers, routes, self._stdio(), self._on_first_end)
            self.first.started = self.readiness.reach
            self.agent.serve()
        except (QmpError, AgentError, OSError) as error:
            self._end_with(str(error))

    def _end_with(self, why: str) -> NoReturn:
        os.write(2, f"the machine can't go on here: {why}\n".encode())
        self.finish()

    def forward(self, number: int) -> None:
        """Pass a signal on to the program."""
        if self.first:
            self.first.forward(number)

    def _attach_disks(self) -> None:
        """Attach the further disks, before the program starts. QmpError, AgentError."""
        for each in self.plan.get("disks", ()):
            self.disks.insert(each["disk"], each["path"], each["file"])
            os.close(each["file"])
        for each in self.plan.get("disks", ()):
            self.changes.request("mount", disk=each["disk"], path=each["path"])

    def _configure(self, network: dict[str, Any]) -> None:
        """Have the agent configure the network. A template has one device: others are inserted when that has its name.
        QmpError; AgentError if one does not appear."""
        if not self.plan.get("inserted"):
            self.agent.request("network", **network)
            return
        self.agent.request("network", **only_first(network))
        for each in self.plan["inserted"]:
            self.devices.insert(each, each["tap"])
            os.close(each["tap"])
        self.changes.request("ports", **network)

    def run(self, message: ShimMessage) -> ProgramSession | None:
        """Have a further program run; None if it is refused. The descriptors of the message are its streams, and its
        connection gets how it ended."""
        request, connection = message.content, message.connection
        stdio = message.take_all()
        name = request.pop("name", None)

        def ended(end: dict[str, Any]) -> None:
            for each in stdio:
                os.close(each)
            if name and "step" in end:
                self.programs.tell(name, {"failed": end})
            connection.reply(end)

        session = self.agent.run("archive" if "archive" in request else "exec", request, stdio, ended)
        if name:
            session.started = lambda: self.programs.tell(name, {})
        return session

    def sign(self, answered: Callable[[], object]) -> None:
        """Ask for a sign that the machine answers."""
        self.agent.ask("ping", {}, lambda _: answered())

    def forget(self, connection: ShimConnection) -> None:
        """Take note that a connection has ended."""
        self.programs.forget(connection)
        if self.readiness.forget(connection):
            self._turn_off()

    # -- its end ---------------------------------------------------------------------------------------------------

    def _on_first_end(self, end: dict[str, Any]) -> None:
        self.status = status_of(end)
        if "step" in end and not self.readiness.reached:
            self._fail(end)
        else:
            self._turn_off()

    def _fail(self, end: dict[str, Any]) -> None:
        """Tell insulad why the program can't be executed, and end when it has read that. If it does not ask, the log
        tells."""

        def nobody_asks() -> None:
            say(end)
            self._turn_off()

        self.readiness.fail(end)
        self.loop.later(_OFF, nobody_asks)

    def _turn_off(self) -> None:
        if self.plan.get("remove"):  # nobody will read its disk
            self.finish()
        self.agent.turn_off()  # it writes what is to be written first; then QEMU ends by itself
        self.loop.later(self.off, self.finish)

    def _on_end(self) -> None:
        """QEMU has ended by itself, or was killed."""
        self.finish()

    def leave(self) -> NoReturn:
        """End here, since the machine runs at another host."""
        for each in self.agent.programs.values():
            each.ended({"step": "exec", "errno": 0, "error": "the machine has moved to another host; execute it again"})
        self.status = 0
        self.finish()

    def finish(self) -> NoReturn:
        """End QEMU, and this process with the status of the guest's program. If QEMU has failed, it is told why."""
        os.kill(self.pid, 9)
        if os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) not in (0, -9) and self.last_words:
            self.last_words.tell()
        os._exit(self.status)
