"""Process 1 of a machine: what comes first, and then the loop that serves the host.

Orphans become its children, as of any process 1, and are reaped. If it ended, the kernel would panic; so it ends by
turning the machine off (reboot(2)).
"""

from __future__ import annotations

import os
import select

from insula.agent import disks, early, files, identity, network, programs, resize, root, warm
from insula.agent.channel import Channel
from insula.container.create.steps import StepError, Steps
from insula.kernel import syscalls
from insula.kernel.cgroups import Cgroup, resources_v2, v2  # noqa: F401 — else each copy would import them itself
from insula.kernel.event_loop import EventLoop
from insula.machine import protocol
from insula.model.cpython import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_GROUP = "program"
_SOON = 0.002
_DRAIN = 5.0  # seconds for the host to read what waits


class Agent:
    """Serves the host: requests, and the streams of programs."""

    def __init__(self, channel: Channel, loop: EventLoop) -> None:
        self.channel, self.loop = channel, loop
        self.programs: dict[int, programs.RunningProgram] = {}
        self.first: programs.RunningProgram | None = None
        self.generation = ""
        self.configured: network.Configured | None = None
        self.warm: warm.WarmProcess | None = None
        self.mounted: dict[str, str] = {}  # where further disks are, by their names
        self.bare: set[str] = set()  # the names of those that are not to be mounted
        self.root = -1  # stays open: else the end of the program would wait until it is unmounted, and all is written
        self.group = Cgroup(_GROUP)
        channel.on_full = lambda: loop.watch(channel.fd, self._on_channel, select.EPOLLIN | select.EPOLLOUT)
        loop.watch(channel.fd, self._on_channel)

    def _on_channel(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.loop.watch(self.channel.fd, self._on_channel)
            self.channel.flush()
            for each in self.programs.values():
                each.watch()
        if events & ~select.EPOLLOUT:
            self._on_frames()

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
            self.channel.answer(session, protocol.ERROR, error.message)
        except OSError as error:
            self.channel.answer(session, protocol.ERROR, StepError(Steps.PREPARE, error).message)
        else:
            if answer is not None:
                self.channel.answer(session, protocol.REPLY, answer)

    def _answer(self, session: int, request: dict[str, Any]) -> dict[str, Any] | None:
        """Do what is asked for, and return the answer; None if it comes later."""
        match request["verb"]:
            case "prepare" if not self.generation and self.warm is None:
                root.make_etc(request["config"])
                self.warm = warm.WarmProcess(request["config"], self.group)
                early.settle_memory()
                return {}
            case "identity":
                identity.assume(request)
                self.generation = request["generation"]
                return {"generation": self.generation, "version": protocol.VERSION}
            case "network" if self.generation:
                wanted = request["interfaces"], request["routes"], request["tables"]
                self.configured = network.configure(*wanted, before=self.configured)
                return {}
            case "ports" if self.configured:
                wanted = request["interfaces"], request["routes"], request["tables"]
                self.configured = network.reconfigure(*wanted, self.configured)
                return {}
            case "mount":
                self._mount(request["disk"], request["path"])
                return {}
            case "unmount":
                self._unmount(request["disk"])
                return {}
            case "start" if self.generation and self.first is None:  # never with the identity of another machine
                root.write_etc(request["files"])
                self.first = self._program(session)
                self.root = root.mount(request["machine"], grows=request.get("grows", False))
                if request.get("hold"):
                    programs.hold(self.root, self.first)
                    return None
                config = request["config"]
                if self.bare:
                    config["linux"]["devices"] = [*config["linux"].get("devices", []), *map(disks.node, self.bare)]
                programs.start(config, self.root, self.group, self.first, self.warm)
                self.warm = None
            case "exec" if self.first:
                programs.execute(request["process"], self.first, self.group, self._program(session))
            case "archive" if self.first:
                files.copy(request, self.first, self._program(session))
            case "resize" if self.first:
                self._resize(session, request["cpus"])
            case "freeze" if self.first and self.first.runs:
                self._freeze(session)
            case "thaw":
                self._thaw()
                return {}
            case "adopt" if self.generation and self.first:
                self._adopt(session, request)
            case "hold" if self.first and self.first.runs:
                self._hold(session)
            case "continue" if self.generation and self.first:
                self._continue(session, request)
            case "ping":
                return {}
            case "off":
                turn_off()
            case other:
                raise OSError(22, f"there is no request {other} now")
        return None

    # -- snapshots -------------------------------------------------------------------------------------------------

    def _freeze(self, session: int) -> None:
        """Stop all programs, and the channel behind the answer: a snapshot of the machine's memory is about to be made.
        What they have written is on the disk before."""
        os.sync()
        self.group.freeze()
        os.sync()  # what was written in between
        for each in self.programs.values():
            each.drain()  # else a copy of this machine would say it again
        self._hold(session)

    def _thaw(self, *, forget: bool = False) -> None:
        self.channel.release(forget=forget)
        self.group.thaw()
        self._resume()

    def _resume(self) -> None:
        """Have programs be heard again, as soon as the port has taken what waits: maybe no frame comes that would."""
        if self.channel.is_held:
            return
        self.channel.flush()
        if self.channel.is_full:
            self.loop.later(_SOON, self._resume)
            return
        for each in self.programs.values():
            each.watch()

    def _adopt(self, session: int, request: dict[str, Any]) -> None:
        """Have programs go on in a machine that has the memory of another one, whose host was talked to before. It
        has an identity of its own by now."""
        assert self.first
        root.write_etc(request["files"])
        root.renew_machine_id(request["machine"])
        identity.rename(self.first.pid, request["config"]["hostname"])
        self._keep_first(session)
        self._thaw(forget=True)
        self.first.reply()

    def _keep_first(self, session: int) -> None:
        """Have the first program go on as `session` with another host. Nobody there reads or writes the streams of
        others, which have negative numbers from now on: no frame has one."""
        assert self.first
        others = [each for each in self.programs.values() if each is not self.first]
        self.programs = {session: self.first, **{-number: each for number, each in enumerate(others, 1)}}
        self.first.move(session)
        for each in others:
            each.abandon()

    # -- migration -------------------------------------------------------------------------------------------------

    def _hold(self, session: int) -> None:
        """Stop the channel behind the answer: the machine is about to leave its host, and programs run meanwhile."""
        self.channel.hold()
        self.channel.answer(session, protocol.REPLY, {})
        try:
            self.channel.drain(_DRAIN)
        except TimeoutError:
            self._thaw()

    def _continue(self, session: int, request: dict[str, Any]) -> None:
        """Have programs go on at another host: the first one as `session`, which it had before."""
        assert self.first
        network.renew_gateways(request["routes"])
        self._keep_first(session)
        self.channel.answer(session, protocol.REPLY, {"pid": self.first.pid})
        self._thaw()

    # -- what comes and grows --------------------------------------------------------------------------------------

    def _resize(self, session: int, cpus: int) -> None:
        """Have so many processors run, and the file system of the disk grow, in a process of its own: that takes its
        time. Then answer how far it came."""
        resize.check(cpus)
        pid, pidfd = syscalls.clone3(0)
        if pid == 0:
            resize.carry_out(cpus, root.grow)

        def ended(_: int) -> None:
            self.loop.unwatch(pidfd)
            os.waitpid(pid, 0)
            os.close(pidfd)
            found = {"cpus": resize.running(), "missing": root.missing()}
            self.channel.answer(session, protocol.REPLY, found)
            self.channel.flush()

        self.loop.watch(pidfd, ended)

    def _mount(self, disk: str, path: str | None) -> None:
        """Find a disk, and mount it at a path, or make its device node: also for programs that run. OSError."""
        disks.find(disk)
        if path is None:
            self.bare.add(disk)
            if self.first and self.first.pid:
                disks.make_node(disk, self.first.pid)
            return
        disks.mount(disk)
        self.mounted[disk] = path
        if self.first and self.first.pid:
            disks.show(disk, path, self.first.pid)

    def _unmount(self, disk: str) -> None:
        """Unmount a disk. EBUSY if a program uses it; then it is mounted as before. Or remove its device node."""
        if disk in self.bare:
            self.bare.remove(disk)
            if self.first and self.first.pid:
                disks.remove_node(disk, self.first.pid)
        if path := self.mounted.get(disk):
            if self.first and self.first.pid:
                disks.hide(path, self.first.pid)
            disks.unmount(disk)
            del self.mounted[disk]

    def _program(self, session: int) -> programs.RunningProgram:
        """A new program, in place of those that have ended."""
        self.programs = {number: each for number, each in self.programs.items() if not each.told}
        made = self.programs[session] = programs.RunningProgram(session, self.channel, self.loop)
        return made


def main() -> NoReturn:
    """Be process 1, with the kernel's file systems mounted: modules that are imported here look into /proc."""
    early.load_modules()
    network.prepare()
    root.prepare()
    loop = EventLoop("agent")
    channel = early.open_channel()
    Agent(channel, loop)
    channel.send_json(0, protocol.HELLO, {"version": protocol.VERSION})
    loop.run()


def turn_off() -> None:
    """Write what is to be written, and turn the machine off."""
    os.sync()
    syscalls.reboot(syscalls.RB_POWER_OFF)
