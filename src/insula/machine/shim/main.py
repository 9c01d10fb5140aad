"""Process 1 of a machine's container: start QEMU, have the guest's program run, and end as it does.

What to do comes as JSON in descriptor `PLAN`. Other descriptors of the container are QEMU's.
"""

from __future__ import annotations

import os
import struct
import time

from insula.kernel.event_loop import EventLoop
from insula.machine.qemu.command_line import GuestDisk, GuestInterface, MachineConfig, arguments, descriptors
from insula.machine.qemu.template import load
from insula.machine.shim.qmp import Qmp, QmpError
from insula.machine.shim.sessions import AgentConnection, AgentError, ProgramSession
from insula.model.cpython import dumps, loads, signal, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

PLAN = 3
NAME = "\0insula-shim"
"""The socket for `exec`: in the abstract namespace (unix(7)), which is that of the container's network."""
FAILED = 125
"""The exit status if the machine could not be started, as of engines."""
FORWARDED = (1, 2, 3, 10, 12, 15)  # SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM
_SEED = 64
_OFF = 10.0
"""Seconds after which a machine that does not turn itself off is ended."""


class Shim:
    """Serves one machine. `plan` has `machine`, a `MachineConfig` as a dict, and `identity`, `network`, `program`."""

    def __init__(self, plan: dict[str, Any], loop: EventLoop) -> None:
        self.plan, self.loop = plan, loop
        self.pid = 0
        self.first: ProgramSession | None = None
        self.status = FAILED
        self.agent: AgentConnection
        self.qmp: Qmp

    def start(self) -> None:
        """Start QEMU, and the program in the guest. QmpError, AgentError, OSError."""
        monitor, of_monitor = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        agent, of_agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        config = machine(self.plan["machine"])._replace(agent=of_agent.fileno(), qmp=of_monitor.fileno())
        for fd in descriptors(config):
            os.set_inheritable(fd, True)
        words = arguments(config, self.plan["qemu"])
        self.pid = os.posix_spawn(words[0], words, {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, "/dev/null", 0, 0)])
        for fd in descriptors(config):
            os.close(fd)
        self.loop.watch(os.pidfd_open(self.pid), lambda _: self._on_end())
        self.agent = AgentConnection(agent, self.loop, lambda: self._on_end())
        self.qmp = Qmp(monitor)
        if config.state >= 0:
            load(self.qmp, config.state, self.plan["disk"])
        self._identify()
        self.agent.request("network", **self.plan["network"])
        program = self.plan["program"]
        stdio = [0] if program["config"]["process"].get("terminal") else [0, 1, 2]
        self.first = self.agent.run("start", program, stdio, self._on_first_end)
        self.agent.serve()

    def _identify(self) -> None:
        """Give the machine its identity. QmpError if it answers with another one: it may be the copy of a copy."""
        generation = os.urandom(16).hex()
        answer = self.agent.request(
            "identity",
            **self.plan["identity"],
            generation=generation,
            seed=os.urandom(_SEED).hex(),
            time=time.time_ns(),
        )
        if answer.get("generation") != generation:
            raise QmpError("the machine did not take its identity")

    def _on_first_end(self, end: dict[str, Any]) -> None:
        self.status = status_of(end)
        self.agent.turn_off()  # it writes what is to be written first; then QEMU ends by itself
        self.loop.later(_OFF, self.finish)

    def _on_end(self) -> None:
        """QEMU has ended by itself, or was killed."""
        self.finish()

    def finish(self) -> NoReturn:
        """End QEMU, and this process with the status of the guest's program."""
        if self.pid:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os._exit(self.status)

    # -- further programs ------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Listen for `exec`: a connection for each program, whose first message has its streams as descriptors."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        listener.bind(NAME)
        listener.listen(64)
        self._listener = listener
        self.loop.watch(listener.fileno(), lambda _: self._accept())

    def _accept(self) -> None:
        fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
        self.loop.watch(fd, lambda _: self._on_client(connection, None))

    def _on_client(self, connection: socket.socket, session: ProgramSession | None) -> None:
        message, stdio = _receive(connection)
        if message is None:
            self.loop.unwatch(connection.fileno())
            connection.close()
            if session:
                session.signal(9)
        elif session is None:

            def ended(end: dict[str, Any]) -> None:
                for each in stdio:
                    os.close(each)
                connection.send(dumps(end).encode())
                self.loop.unwatch(connection.fileno())
                connection.close()

            made = self.agent.run("exec", message, stdio, ended)
            self.loop.watch(connection.fileno(), lambda _: self._on_client(connection, made))
        elif "signal" in message:
            session.signal(message["signal"])


def status_of(end: dict[str, Any]) -> int:
    """The exit status for how a program ended, as a shell has it: 128 and the signal, 127 if there is no such program,
    126 if it can't be executed."""
    if "status" in end:
        status = int(end["status"])
        return status if status >= 0 else 128 - status
    os.write(2, f"{end.get('step')}: {end.get('error')}\n".encode())
    return 127 if end.get("errno") == 2 else 126


def machine(plan: dict[str, Any]) -> MachineConfig:
    """The machine that a plan describes."""
    disks = [GuestDisk(*each) for each in plan.pop("disks")]
    interfaces = [GuestInterface(*each) for each in plan.pop("interfaces")]
    return MachineConfig(**plan, agent=-1, qmp=-1, disks=disks, interfaces=interfaces)


def _receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """A message and its descriptors; None at the end."""
    try:
        data, ancillary, _, _ = connection.recvmsg(1 << 17, 256, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None, []
    found: list[int] = []
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found += struct.unpack(f"{len(rights) // 4}i", rights[: len(rights) & ~3])
    return (loads(data.decode()) if data else None), found


def main() -> NoReturn:
    """Be process 1 of the container."""
    plan = loads(os.read(PLAN, 1 << 20).decode())
    os.close(PLAN)
    loop = EventLoop("shim")
    shim = Shim(plan, loop)
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in FORWARDED:
        signal.signal(number, lambda *_: None)

    def forward(_: int) -> None:
        for number in os.read(read, 64):
            if shim.first:
                shim.first.signal(number)

    loop.watch(read, forward)
    try:
        shim.start()
        shim.listen()
    except (QmpError, AgentError, OSError, TimeoutError) as error:
        os.write(2, f"the machine can't be started: {error}\n".encode())
        shim.finish()
    loop.run()
