"""The shim of a machine of a disk image: Insula has no agent in it, so the shim has less to do.

The machine's serial port is QEMU's standard input and output, which are the container's. A signal that asks a program
to end is the power button (ACPI), pressed again every `AGAIN` seconds, since a system that is still booting, or busy,
loses it. The shim ends as QEMU does: with 0 when the system has turned the machine off.

Network devices and further disks come and go as those of other machines do, but for the agent: the system in the
machine finds what it gets, and lets go of what it loses, by itself.

If there is an agent of QEMU in the guest (guest_agent.py), it is asked to turn the system off as well, to freeze its
file systems for a snapshot of the disk, and to take the time when the machine stood still.
"""

from __future__ import annotations

import contextlib
import os

from insula.machine.qemu.devices import HotPlugBus
from insula.machine.qemu.disk_machine import AGENT, SCREEN
from insula.machine.qemu.state import load
from insula.machine.shim.cds import Cds
from insula.machine.shim.changes import MachineChanges
from insula.machine.shim.common import FAILED
from insula.machine.shim.disks import FurtherDisks
from insula.machine.shim.guest_agent import GuestAgent, GuestAtMoment, ask_claims, set_time
from insula.machine.shim.hotplug import NetworkDevices
from insula.machine.shim.main import Shim
from insula.machine.shim.qmp import QmpError
from insula.machine.shim.questions import Questions, RefusedQuestion, descriptor
from insula.machine.shim.resize import MachineSize
from insula.machine.shim.slots import Slots
from insula.machine.shim.start import StartedQemu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from insula.kernel.event_loop import EventLoop
    from insula.machine.shim.connection import ShimConnection, ShimMessage

AGAIN = 2.0
_SIGN = 0.5  # seconds in which nothing else is done here
_POWER_BUTTON = (2, 3, 15)  # SIGINT, SIGQUIT, SIGTERM
NO_AGENT = "this machine runs a disk image, in which Insula has no agent"


class NoAgent:
    """Stands for the agent where there is none."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop

    def ask(self, verb: str, arguments: dict[str, Any], answered: Callable[[dict[str, Any]], object]) -> None:
        """Answer that it is done, later: the system in the machine does it, or not."""
        self._loop.later(0.0, lambda: answered({}))

    def request(self, verb: str, **arguments: Any) -> None:
        """Do nothing, as above."""


class DiskMachineShim(Shim):
    """Serves one machine. The plan has `disk_machine`, the generation of its `identity`, its size: `disk`, `memory`
    and `cpus`, and what comes and goes: the ports of its `network` in its `slots`, `further` disks (disks.py), and the
    `bus` of these; and the names of the `cds` in its drives."""

    pressed = False

    def start(self) -> None:
        """Have the machine run. QmpError, OSError."""
        self.loop.watch(os.pidfd_open(self.pid), lambda _: self._on_end())
        assert isinstance(self._started, StartedQemu)
        self.guest = GuestAgent(self._started.agent, self.loop, self._has_agent)
        self.qmp = self.monitor()
        self.size = MachineSize(self.qmp, self.plan, "disk")
        self.changes = MachineChanges(NoAgent(self.loop), self.loop)
        self.slots = Slots(self.qmp, self.loop, self.plan["slots"], HotPlugBus(*self.plan["bus"]))
        self.devices = NetworkDevices(self.qmp, self.changes, self.slots, self.plan["network"])
        self.disks = FurtherDisks(self.qmp, self.changes, self.slots, self.plan["further"])
        self.cds = Cds(self.qmp, self.plan["cds"])
        if self.plan["state"] >= 0:
            load(self.qmp, self.plan["state"])
            set_time(self.guest, lambda: None)
        self.loop.watch(self.qmp.fileno(), lambda _: self._drain())
        self.readiness.reach()

    def forward(self, number: int) -> None:
        """Press the power button for a signal that asks to end; drop others, which have no meaning for a machine."""
        if number in _POWER_BUTTON and not self.pressed:
            self.pressed = True
            self._press()
            self.guest.ask("guest-shutdown", {}, lambda _: None)  # there is no answer if it works

    def _press(self) -> None:
        if self.readiness.reached:
            with contextlib.suppress(QmpError, OSError):  # QEMU is just ending
                self.qmp.execute("system_powerdown")
        self.loop.later(AGAIN, self._press)

    def _has_agent(self) -> bool:
        """Whether a program in the guest has the agent's port open."""
        try:
            return any(each["label"] == AGENT and each["frontend-open"] for each in self.qmp.execute("query-chardev"))
        except (QmpError, OSError, KeyError, TypeError):
            return False

    def _drain(self) -> None:
        """Drop QEMU's events, which it would keep until they are read."""
        try:
            self.qmp.drain()
        except (QmpError, OSError):  # QEMU is just ending
            self.loop.unwatch(self.qmp.fileno())

    def _on_end(self) -> NoReturn:
        """QEMU has ended: the system has turned the machine off, or QEMU was killed."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if status not in (0, -9) and self.last_words:
            self.last_words.tell()
        os._exit((status if status >= 0 else 128 - status) if self.readiness.reached else FAILED)

    def sign(self, answered: Callable[[], object]) -> None:
        """Ask QEMU, again and again until it answers."""
        try:
            with self.qmp.within(_SIGN):
                self.qmp.execute("query-status")
        except (QmpError, OSError):
            self.loop.later(AGAIN, lambda: self.sign(answered))
        else:
            answered()

    def run(self, message: ShimMessage) -> None:
        """Refuse: nobody could run a program in the guest."""
        message.close()
        message.connection.reply({"step": "exec", "errno": 1, "error": NO_AGENT})


class DiskMachineQuestions(Questions):
    """Answers for one machine; beside what others answer, about its screen and its system."""

    def __init__(self, shim: DiskMachineShim) -> None:
        super().__init__(shim)
        self._machine = shim
        self.verbs |= {"insert": self._insert, "guest": self._report, "screen": self._screen, "vnc": self._view}
        self._claimants: list[ShimConnection] = []  # that wait for what the system says

    def _identify(self, message: ShimMessage) -> None:
        """Have another `generation`, and tell the guest the time, if it has an agent."""
        self._machine.identity.renew(message.content["generation"])
        set_time(self._machine.guest, lambda: self._machine.readiness.ask(message.connection))

    def _freeze(self, message: ShimMessage) -> None:
        """Refuse: nobody could hold its programs."""
        raise RefusedQuestion(NO_AGENT)

    def _agent_at_moment(self, memory: int) -> GuestAtMoment:
        return GuestAtMoment(self._machine.guest, self._machine.loop, freeze=memory < 0)

    def _resize(self, message: ShimMessage) -> None:
        """Have its disk grow, and tell what it has."""
        self._machine.size.grow_disk(message.content["disk"])
        message.connection.reply(self._machine.size.answer())

    def _insert(self, message: ShimMessage) -> None:
        """Have a `cd`, whose file is the descriptor, or none in a `drive` (cds.py)."""
        cd, drive = message.content["cd"], message.content["drive"]
        self._changeable()
        self._machine.cds.change(drive, cd, -1 if cd is None else descriptor(message))
        message.connection.reply({})

    def _report(self, message: ShimMessage) -> None:
        """Tell what the system says of itself: what the agent of QEMU returns, by its commands."""
        self._claimants.append(message.connection)
        if len(self._claimants) == 1:
            ask_claims(self._machine.guest, self._on_claims)

    def _on_claims(self, claims: dict[str, Any]) -> None:
        claimants, self._claimants = self._claimants, []
        for each in claimants:
            each.reply(claims)

    def _screen(self, message: ShimMessage) -> None:
        """Write a picture of the screen (PNG) to the descriptor, and tell when it is written."""
        qmp = self._machine.qmp
        qmp.add(SCREEN, descriptor(message))
        try:
            qmp.execute("screendump", filename=f"/dev/fdset/{SCREEN}", format="png")
        finally:
            qmp.execute("remove-fd", **{"fdset-id": SCREEN})
        message.connection.reply({})

    def _view(self, message: ShimMessage) -> None:
        """Make the socket that comes with it a viewer of the screen (RFB, RFC 6143). It needs no password: whoever may
        send it here has one end of it."""
        self._machine.qmp.give("viewer", descriptor(message))
        self._machine.qmp.execute("add_client", protocol="vnc", fdname="viewer", skipauth=True)
        message.connection.reply({})
