"""Programs of a machine, and their streams.

A program is started as on a host: `spawn` makes PID 1 of new namespaces and `join` another process in them, and both
tell over a socket how far they are (`insula.container.create`). The machine's own namespaces of users and of the
network are those of the program: it has the machine for itself.

Output is read from pipes or a terminal while the host has granted bytes, and goes to the channel. Input comes from
the channel, and waits here until the program reads it; the host sends no more than was granted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct

from insula.agent.channel import Channel
from insula.container import wire
from insula.container.create import join, spawn
from insula.container.create.steps import StepError, Steps
from insula.kernel import mounts, syscalls
from insula.kernel.cgroups import Cgroup
from insula.kernel.event_loop import EventLoop
from insula.kernel.rollback import Rollback
from insula.machine import protocol
from insula.model.cpython import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.agent.warm import WarmProcess
    from insula.model.cpython import socket

_TIOCSWINSZ = 0x5414
_WITHOUT_END = 1 << 62  # bytes


class RunningProgram:
    """A process from its fork to its end, as one session of the channel."""

    def __init__(self, session: int, channel: Channel, loop: EventLoop) -> None:
        self.session, self.channel, self.loop = session, channel, loop
        self.sync: socket.socket | None = None
        self.pid, self.pidfd = 0, -1
        self.failure: dict[str, Any] | None = None
        self.replied = False
        self.status: int | None = None
        self.outputs: dict[int, int] = {}  # kind by descriptor
        self.input = -1
        self.terminal = -1
        self._credit = protocol.WINDOW
        self._stdin = bytearray()
        self._no_more_input = False
        self.told = False  # that it has ended
        self.is_init = False  # PID 1 of its namespace
        self._size = (0, 0)  # rows and columns that the host has told

    # -- its start -----------------------------------------------------------------------------------------------

    def follow(self, sync: socket.socket) -> None:
        """Watch the channel to the child."""
        self.sync = sync
        self.loop.watch(sync.fileno(), lambda _: self._on_message())

    def adopt(self, pid: int, pidfd: int) -> None:
        self.pid, self.pidfd = pid, pidfd
        self.loop.watch(pidfd, lambda _: self._on_end())

    def add(self, kind: int, fd: int) -> None:
        """Add our end of a stream."""
        os.set_blocking(fd, False)
        if kind == protocol.STDIN:
            self.input = fd
        else:
            self.outputs[fd] = kind
        self.watch()

    def _on_message(self) -> None:
        assert self.sync is not None
        received = wire.receive(self.sync)
        if received is None:  # it has executed the program, or has ended
            self.loop.unwatch(self.sync.fileno())
            self.sync.close()
            self.sync = None
            self.reply()
            return
        message, descriptors = received
        match message["event"]:
            case "terminal":
                self.terminal = self.input = descriptors.pop(0)
                self.add(protocol.STDOUT, self.terminal)
                self._resize()
            case "error":
                self.failure = {key: message[key] for key in ("step", "object", "errno", "error", "path")}
            case "forked":
                self.adopt(message["pid"], os.pidfd_open(message["pid"]))
            case "ready":
                wire.send(self.sync, {"event": "start"})
        for fd in descriptors:
            os.close(fd)

    def reply(self) -> None:
        """Tell that it runs, or why it does not."""
        if self.failure:
            self.channel.send_json(self.session, protocol.ERROR, self.failure)
        else:
            self.channel.send_json(self.session, protocol.REPLY, {"pid": self.pid})
        self.replied = True

    @property
    def runs(self) -> bool:
        """Whether it is executed, and has not ended."""
        return self.pid > 0 and self.sync is None and self.status is None

    def move(self, session: int) -> None:
        """Be the program of another session, at another host, which has granted nothing but a window."""
        self.session, self._credit = session, protocol.WINDOW

    def abandon(self) -> None:
        """Go on without anybody at the other end: output goes nowhere, and input has come to its end."""
        self.session, self._credit, self._no_more_input = protocol.NOBODY, _WITHOUT_END, True

    # -- its streams ---------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Watch what may be read or written now."""
        masks: dict[int, int] = {}
        for fd in self.outputs:
            masks[fd] = select.EPOLLIN if self._credit > 0 and not self.channel.is_full else 0
        if self.input >= 0 and (self._stdin or self._no_more_input):
            masks[self.input] = masks.get(self.input, 0) | select.EPOLLOUT
        elif self.input >= 0 and self.input != self.terminal:
            masks[self.input] = 0
        for fd, mask in masks.items():
            self.loop.watch(fd, lambda events, fd=fd: self._on_ready(fd, events), mask)  # type: ignore[misc]

    def _on_ready(self, fd: int, events: int) -> None:
        if fd in self.outputs and events & ~select.EPOLLOUT:
            self._read(fd)
        if fd == self.input and events & ~select.EPOLLIN:
            self._write()
        self.watch()

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, min(protocol.CHUNK, self._credit))
        except BlockingIOError:
            return
        except OSError:  # EIO: no process has the terminal open
            data = b""
        if data:
            self._credit -= len(data)
            self.channel.send(self.session, self.outputs[fd], data)
            return
        self._close(fd)
        if self.status is not None:
            self.drain()  # the other output may have more

    def _write(self) -> None:
        granted = 0
        try:
            while self._stdin:
                written = os.write(self.input, self._stdin[: protocol.CHUNK])
                del self._stdin[:written]
                granted += written
        except BlockingIOError:
            pass
        except OSError:  # nobody reads it
            granted += len(self._stdin)
            self._stdin.clear()
            self._no_more_input = True
        if granted:
            self.channel.send(self.session, protocol.GRANT, protocol.NUMBER.pack(granted))
        if self._no_more_input and not self._stdin and self.input >= 0 and self.input != self.terminal:
            self._close(self.input)

    def _close(self, fd: int) -> None:
        self.loop.unwatch(fd)
        self.outputs.pop(fd, None)
        if fd == self.input:
            self.input = -1
        if fd == self.terminal:
            self.terminal = -1
        os.close(fd)

    def receive(self, kind: int, payload: bytes) -> None:
        """Do what a frame of the host tells."""
        match kind:
            case protocol.STDIN:
                self._stdin += payload
            case protocol.STDIN_EOF:
                self._no_more_input = True
            case protocol.GRANT:
                self._credit += protocol.NUMBER.unpack(payload)[0]
                if self.status is not None:
                    self.drain()
            case protocol.RESIZE:
                self._size = protocol.SIZE.unpack(payload)
                self._resize()
            case protocol.SIGNAL if self.pidfd >= 0 and self.status is None:
                signal.pidfd_send_signal(self.pidfd, payload[0])
                if payload[1:]:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.pid, payload[0])
        self.watch()

    def _resize(self) -> None:
        """Set the size of the terminal (TIOCSWINSZ, ioctl_tty(2)); if it is not open yet, when it is opened."""
        if self.terminal >= 0 and self._size != (0, 0):
            fcntl.ioctl(self.terminal, _TIOCSWINSZ, struct.pack("4H", *self._size, 0, 0))

    # -- its end -------------------------------------------------------------------------------------------------

    def _on_end(self) -> None:
        """Record its status, and tell it when its output has come to an end."""
        self.loop.unwatch(self.pidfd)
        while self.sync is not None:  # what it had to say comes first
            self._on_message()
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if self.is_init and self.status == -signal.SIGINT:  # it has turned itself off: reboot(2), in a PID namespace
            self.status = 0
        os.close(self.pidfd)
        self.pidfd = -1
        self.drain()

    def drain(self) -> None:
        """Read what is there, after its end or while it is frozen: others may hold the other end open. More is read
        when it is granted."""
        for fd in list(self.outputs):
            while fd in self.outputs and self._credit > 0 and select.select([fd], [], [], 0)[0]:
                self._read(fd)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self.status is None or self.told:
            return
        if self._credit <= 0 and select.select(list(self.outputs), [], [], 0)[0]:
            return
        self.told = True
        for fd in [*self.outputs, *([self.input] if self.input >= 0 else [])]:
            self._close(fd)
        if not self.failure:
            self.channel.send_json(self.session, protocol.EXIT, {"status": self.status})


def start(config: dict[str, Any], root: int, group: Cgroup, program: RunningProgram, warm: WarmProcess | None) -> None:
    """Start the first program: PID 1 of the namespaces that `config` (OCI runtime-spec) asks for. `warm` becomes it if
    that fits. StepError, OSError."""
    with Rollback() as child_fds:
        program.is_init = True
        stdio = streams(config["process"], program, child_fds)
        if warm and warm.fits(config):
            program.adopt(warm.pid, warm.pidfd)
            program.follow(warm.sync)
            warm.assign(config, root, stdio)
            return
        if warm:
            warm.discard()
        outside = spawn.SpawnOptions(root=root, stdio=stdio)
        made = spawn.spawn(config, group, outside)
        program.adopt(made.pid, made.pidfd)
        program.follow(made.sync)
        wire.send(made.sync, {"event": "mapped"})


def hold(root: int, program: RunningProgram) -> None:
    """Have a process in place of the first program, in a mount namespace of its own, whose root is this mount, and
    which only waits: for whoever copies files. OSError."""
    pid, pidfd = syscalls.clone3(syscalls.CLONE_NEWNS)
    if pid == 0:
        mounts.attach(root, os.open("/", os.O_PATH | os.O_DIRECTORY))
        os.fchdir(root)
        os.chroot(".")
        os.closerange(0, 1 << 16)
        while True:
            select.select([], [], [])
    program.adopt(pid, pidfd)
    program.reply()


def execute(what: dict[str, Any], first: RunningProgram, group: Cgroup, program: RunningProgram) -> None:
    """Start another program in the namespaces of the first one. StepError, OSError."""
    if first.status is not None or first.pid == 0:
        raise StepError(Steps.JOIN_CONTAINER, OSError(3, "its first program has ended"))
    with Rollback() as child_fds:
        target = child_fds.hold(os.pidfd_open(first.pid))
        groups = [child_fds.hold(fd) for fd in group.group_to_join(first.pid).open()]
        ours, theirs = wire.pair()
        child_fds.callback(theirs.close)
        stdio = streams(what, program, child_fds)
        flags = join.ALL & ~(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNET)
        pid, pidfd = syscalls.clone3(0)
        if pid == 0:
            join.main(join.ExecArgs(what, target, theirs, groups, stdio, None, flags=flags))
        program.follow(ours)
        os.waitpid(pid, 0)
        os.close(pidfd)


def streams(what: dict[str, Any], program: RunningProgram, child_fds: Rollback) -> list[int]:
    """Make pipes for the standard streams, and return the child's ends; none for a terminal, which the child opens."""
    if what.get("terminal"):
        return []
    found = []
    for kind in (protocol.STDIN, protocol.STDOUT, protocol.STDERR):
        read, write = os.pipe2(os.O_CLOEXEC)
        child, ours = (read, write) if kind == protocol.STDIN else (write, read)
        user = what.get("user") or {}
        os.fchown(child, user.get("uid", 0), user.get("gid", 0))
        found.append(child_fds.hold(child))
        program.add(kind, ours)
    return found
