"""What insulad asks the shim: a connection for each question, whose first message has the verb as `ask`.

A generation of the machine is in the answer where that counts. What can't be done is answered by an `error`.
"""

from __future__ import annotations

import contextlib

from insula.machine.qemu import snapshot
from insula.machine.shim.answers import Answers
from insula.machine.shim.departure import Departure
from insula.machine.shim.moment import StandStill
from insula.machine.shim.qmp import QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from insula.machine.shim.changes import Answer
    from insula.machine.shim.connection import ShimConnection, ShimMessage
    from insula.machine.shim.main import Shim
    from insula.machine.shim.moment import AgentAtMoment

    Verb = Callable[[ShimMessage], object]

_SAID = 300  # characters of an error
_BUSY = "another snapshot of it is being made, its devices are changing, or it does not run yet"
_HELD = "a snapshot of it is being made, or it does not run yet"


class RefusedQuestion(Exception):
    """The reason why something is not done now."""


class Questions:
    """Answers for a machine with the agent. `verbs` has a method for each question, which answers now or later."""

    def __init__(self, shim: Shim) -> None:
        self._shim = shim
        self._moment: StandStill | Departure | None = None  # while the machine stands still, or leaves
        self._answers = Answers(shim.loop, shim.sign, lambda: bool(self._moment) or not shim.readiness.reached)
        self.verbs: dict[str, Verb] = {
            "ready": self._ready,
            "started": self._started,
            "answers": self._tell_answers,
            "identity": self._identify,
            "moment": self._stand_still,
            "freeze": self._freeze,
            "devices": self._devices,
            "plug": self._plug,
            "unplug": self._unplug,
            "attach": self._attach,
            "detach": self._detach,
            "size": self._size,
            "resize": self._resize,
            "describe": self._describe,
            "migrate": self._migrate,
            "end": self._decide,
            "back": self._decide,
            "arrive": self._arrive,
            "own": self._own,
        }

    def answer(self, message: ShimMessage) -> None:
        """Answer a question."""
        try:
            self.verbs.get(str(message.content["ask"]), _refuse)(message)
        except (RefusedQuestion, QmpError, OSError) as error:
            message.connection.reply({"error": str(error)[:_SAID]})
        finally:
            message.close()

    def forget(self, connection: ShimConnection) -> None:
        """Take note that a connection has ended."""
        self._answers.forget(connection)

    # -- its start -------------------------------------------------------------------------------------------------

    def _ready(self, message: ShimMessage) -> None:
        """Tell when the machine has its identity, and its program runs; with the `seconds` of each step. If that can't
        be executed, `failed` is the message of a `StepError`."""
        self._shim.readiness.ask(message.connection)

    def _started(self, message: ShimMessage) -> None:
        """Tell when the program `name` of `exec` is executed, or why it is not, as above."""
        self._shim.programs.ask(message.content["name"], message.connection)

    def _identify(self, message: ShimMessage) -> None:
        """Have the machine, which was stopped meanwhile, take on another identity with this `generation`."""
        shim, connection = self._shim, message.connection

        def answered(answer: Answer) -> None:
            if answer.get("generation") == shim.identity.generation:
                shim.readiness.reach()
            connection.reply(answer)

        shim.identity.renew(message.content["generation"])
        shim.readiness.lose()
        shim.identity.ask(shim.agent, answered)

    def _tell_answers(self, message: ShimMessage) -> None:
        """Tell whether it answers, now and each time that this changes (answers.py)."""
        self._answers.listen(message.connection)

    # -- moments ---------------------------------------------------------------------------------------------------

    def _stand_still(self, message: ShimMessage) -> None:
        """Hold the machine still, and write its memory to the descriptor if there is one (moment.py)."""
        self._hold(message, stop=True)

    def _freeze(self, message: ShimMessage) -> None:
        """Hold its programs, since its container is about to be frozen (moment.py)."""
        self._hold(message, stop=False)

    def _hold(self, message: ShimMessage, *, stop: bool) -> None:
        if self._is_busy:
            raise RefusedQuestion(_BUSY)
        shim = self._shim
        if stop:
            shim.disks.forget_gone()
        memory = message.take()
        self._moment = StandStill(
            message.connection,
            memory,
            shim.loop,
            shim.qmp,
            self._agent_at_moment(memory),
            shim.identity,
            self._has(),
            self._on_moment_end,
            stop=stop,
        )
        self._moment.begin()

    def _agent_at_moment(self, memory: int) -> AgentAtMoment:
        """The agent of a machine that is to stand still; `memory` is -1 if that is not kept."""
        return self._shim.agent

    def _on_moment_end(self) -> None:
        self._moment = None

    @property
    def _is_busy(self) -> bool:
        """Whether it can't be held still now."""
        return bool(self._moment or not self._shim.readiness.reached or self._shim.changes.are_pending)

    # -- devices ---------------------------------------------------------------------------------------------------

    def _devices(self, message: ShimMessage) -> None:
        """Tell which `ports` have a network device, and which further `disks` there are."""
        slots = self._shim.slots
        if slots.disks and not self._is_busy:
            with contextlib.suppress(QmpError):
                self._shim.disks.forget_gone()
        message.connection.reply({"ports": [*slots.ports], "disks": [*self._shim.disks.there]})

    def _plug(self, message: ShimMessage) -> None:
        """Plug in a network device for a `port`, whose tap is the descriptor, and have the `network` with it
        (hotplug.py)."""
        port, network = message.content["port"], message.content["network"]
        tap = message.descriptors[0] if message.descriptors else -1
        self._changeable().devices.plug(port, tap, network, message.connection.reply)

    def _unplug(self, message: ShimMessage) -> None:
        """Remove the device of the port with an `index`, and have the `network` without it."""
        index, network = message.content["index"], message.content["network"]
        self._changeable().devices.unplug(index, network, message.connection.reply)

    def _attach(self, message: ShimMessage) -> None:
        """Attach a further `disk`, whose file is the descriptor; mount it at the `path` if there is one (disks.py)."""
        name, path = message.content["disk"], message.content["path"]
        self._changeable().disks.attach(name, path, descriptor(message), message.connection.reply)

    def _detach(self, message: ShimMessage) -> None:
        """Remove a further `disk`."""
        self._changeable().disks.detach(message.content["disk"], message.connection.reply)

    def _size(self, message: ShimMessage) -> None:
        """Tell what the machine has: `disk`, `memory`, `cpus`."""
        message.connection.reply(self._shim.size.answer())

    def _resize(self, message: ShimMessage) -> None:
        """Have it grow to that (resize.py)."""
        self._changeable().growing.grow(message.content, message.connection.reply)

    def _changeable(self) -> Shim:
        """The machine, if its devices may change now. RefusedQuestion."""
        if self._moment or not self._shim.readiness.reached:
            raise RefusedQuestion(_HELD)
        return self._shim

    def _has(self) -> dict[str, Any]:
        """What another machine must have that goes on in its place."""
        shim = self._shim
        return {**shim.size.described(), "slots": shim.devices.taken(), "disks": shim.disks.there}

    # -- migration -------------------------------------------------------------------------------------------------

    def _describe(self, message: ShimMessage) -> None:
        """Tell what QEMU it is, how its processors are made, and what devices it has: another host must have the
        same."""
        self._shim.disks.forget_gone()
        command, found = self._shim.plan["command"], snapshot.describe(self._shim.qmp)
        accelerator, processor = (command[command.index(option) + 1] for option in ("-accel", "-cpu"))
        made = {"accelerator": accelerator.partition(",")[0], "processor": processor}
        message.connection.reply({**found, **self._has(), **made})

    def _migrate(self, message: ShimMessage) -> None:
        """Send it to another host (departure.py); the descriptors are for its own disk, for the further `disks` in the
        order of their names, and for its memory."""
        shim = self._shim
        if self._is_busy:
            raise RefusedQuestion(_HELD)
        shim.disks.forget_gone()
        if {*message.content.get("disks", ())} != {*shim.disks.there}:
            raise RefusedQuestion("its further disks have changed, or its guest has let go of one: try again")
        if len(message.descriptors) != len(shim.nodes) + 1:
            raise RefusedQuestion("it comes with a descriptor for each disk, and one for the memory")
        to, own = message.take_all(), (shim.loop, shim.qmp, shim.agent, shim.identity)
        self._moment = Departure(message.connection, shim.nodes, to, *own, self._on_moment_end, shim.leave)
        self._moment.begin()

    def _decide(self, message: ShimMessage) -> None:
        """Decide about one that was sent: `end` it here, or have it `back`."""
        if isinstance(self._moment, Departure):
            self._moment.answer_to(message.connection)
            self._moment.told({message.content["ask"]: True})
        else:
            message.connection.reply({"running": self._shim.readiness.reached})

    def _arrive(self, message: ShimMessage) -> None:
        """Receive it from another host (arrival.py)."""
        if not self._shim.arrival:
            raise RefusedQuestion("it comes from no other host")
        self._shim.arrival.begin(message.connection, message.take_all())

    def _own(self, message: ShimMessage) -> None:
        """Have one go on that has arrived, with the numbers of the agent's `sessions` there; then as `ready`."""
        arrival, readiness = self._shim.arrival, self._shim.readiness
        if not readiness.reached and not (arrival and arrival.arrived):
            message.connection.close()  # it is asked again
            return
        readiness.ask(message.connection)
        if not self._shim.first:
            self._shim.own(message.content["sessions"])


def descriptor(message: ShimMessage) -> int:
    """The descriptor that comes with a question. RefusedQuestion if there is none."""
    if not message.descriptors:
        raise RefusedQuestion("it comes with a descriptor")
    return message.descriptors[0]


def _refuse(message: ShimMessage) -> None:
    raise RefusedQuestion("there is no such question")
