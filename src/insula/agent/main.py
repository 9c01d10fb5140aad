"""Process 1 of a machine: what comes first, and then the loop that serves the host.

Orphans become its children, as of any process 1, and are reaped. If it ended, the kernel would panic; so it ends by
turning the machine off (reboot(2)).
"""

from __future__ import annotations

import os

from insula.agent import early, identity, network, programs, root
from insula.agent.channel import Channel
from insula.container.create.steps import StepError, Steps
from insula.kernel import syscalls
from insula.kernel.cgroups import Cgroup
from insula.kernel.event_loop import EventLoop
from insula.machine import protocol
from insula.model.cpython import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_GROUP = "program"


class Agent:
    """Serves the host: requests, and the streams of programs."""

    def __init__(self, channel: Channel, loop: EventLoop) -> None:
        self.channel, self.loop = channel, loop
        self.programs: dict[int, programs.RunningProgram] = {}
        self.first: programs.RunningProgram | None = None
        self.generation = ""
        self.group = Cgroup(_GROUP)
        loop.watch(channel.fd, lambda _: self._on_frames())

    def _on_frames(self) -> None:
        for session, kind, payload in self.channel.receive():
            if kind == protocol.REQUEST:
                self._on_request(session, loads(payload))
            elif program := self.programs.get(session):
                program.receive(kind, payload)
        self.channel.flush()

    def _on_request(self, session: int, request: dict[str, Any]) -> None:
        try:
            answer = self._answer(session, request)
        except StepError as error:
            self.channel.send_json(session, protocol.ERROR, error.message)
        except OSError as error:
            self.channel.send_json(session, protocol.ERROR, StepError(Steps.PREPARE, error).message)
        else:
            if answer is not None:
                self.channel.send_json(session, protocol.REPLY, answer)

    def _answer(self, session: int, request: dict[str, Any]) -> dict[str, Any] | None:
        """Do what is asked for, and return the answer; None if it comes later."""
        match request["verb"]:
            case "identity":
                identity.assume(request)
                self.generation = request["generation"]
                return {"generation": self.generation, "version": protocol.VERSION}
            case "network":
                network.configure(request["interfaces"], request["routes"])
                return {}
            case "start":
                root.write_etc(request["files"])
                self.first = self._program(session)
                programs.start(request["config"], root.mount(read_only=request["read_only"]), self.group, self.first)
            case "exec" if self.first:
                programs.execute(request["process"], self.first, self.group, self._program(session))
            case "off":
                turn_off()
            case other:
                raise OSError(22, f"there is no request {other} now")
        return None

    def _program(self, session: int) -> programs.RunningProgram:
        made = self.programs[session] = programs.RunningProgram(session, self.channel, self.loop)
        return made


def main() -> NoReturn:
    """Be process 1, with the kernel's file systems mounted: modules that are imported here look into /proc."""
    early.load_modules()
    network.raise_loopback()
    loop = EventLoop("agent")
    channel = Channel(early.open_port())
    Agent(channel, loop)
    channel.send_json(0, protocol.HELLO, {"version": protocol.VERSION})
    loop.run()


def turn_off() -> None:
    """Write what is to be written, and turn the machine off."""
    os.sync()
    syscalls.reboot(syscalls.RB_POWER_OFF)
