"""A warm container's process: it is prepared as far as containers are alike, waits for its assignment, and becomes that
container.

The zygote of the service keeps some (`insula.container.service.warm_pool`), and the agent of a virtual machine has one
when the machine becomes a template (`insula.agent.warm`).
"""

from __future__ import annotations

import os

from insula.container import wire
from insula.container.create import init
from insula.container.create.exec_process import Filter
from insula.container.create.rootfs import PremountPlan, leave_host
from insula.container.create.sources import PreparedMounts
from insula.container.create.steps import INTERRUPTED, Steps, send, step
from insula.kernel import syscalls
from insula.model.cpython import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from insula.container.create.namespaces import Plan
    from insula.model.cpython import socket


class Assignment:
    """The message that tells a warm container which container it becomes, with the descriptors that it needs.

    `config` is an open file with a `Launch`, since a message has a limit; `program` an open file with a compiled filter
    (-1: none) and `flags` its flags; `root`, `sources` and `stdio` as in `insula.container.create.init.InitArgs`.
    """

    def __init__(
        self, *, config: int, program: int, flags: int, root: int, sources: PreparedMounts, stdio: list[int]
    ) -> None:
        self.config, self.program, self.flags, self.root = config, program, flags, root
        self.sources, self.stdio = sources, stdio

    def send(self, sync: socket.socket) -> None:
        """Send it to the child. ValueError for more descriptors than a message takes."""
        descriptors = [self.config, self.root, *self.sources.descriptors(), *(fd for fd in self.stdio if fd >= 0)]
        if self.program >= 0:
            descriptors.append(self.program)
        if len(descriptors) > wire.MAX_DESCRIPTORS:
            raise ValueError(f"{len(descriptors)} descriptors")
        message = {
            "event": "launch",
            "mounts": list(self.sources.mounts),
            "devices": list(self.sources.devices),
            "stdio": [fd >= 0 for fd in self.stdio],
            "program": self.program >= 0,
            "flags": self.flags,
        }
        wire.send(sync, message, descriptors)

    @classmethod
    def receive(cls, sync: socket.socket) -> Assignment | None:
        """In the child: the assignment; None if the parent is gone."""
        received = wire.receive(sync)
        if received is None:
            return None
        message, descriptors = received
        fds = iter(descriptors)
        prepared = PreparedMounts()
        config, root = next(fds), next(fds)
        prepared.mounts = {index: next(fds) for index in message["mounts"]}
        prepared.devices = {path: next(fds) for path in message["devices"]}
        stdio = [next(fds) if there else -1 for there in message["stdio"]]
        program = next(fds) if message["program"] else -1
        return cls(config=config, program=program, flags=message["flags"], root=root, sources=prepared, stdio=stdio)

    def read_config(self) -> dict[str, Any]:
        """The config.json in the file of the launch."""
        config: dict[str, Any] = loads(_read(self.config))["config"]
        return config

    def read_program(self) -> Filter | None:
        """The compiled filter, if there is one."""
        return Filter(_read(self.program), self.flags) if self.program >= 0 else None


def _read(fd: int) -> bytes:
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return data


def wait_for_assignment(premount_plan: PremountPlan, args: init.InitArgs, plan: Plan) -> NoReturn:
    """In the child: set up the namespaces, wait for the assignment, and become that container."""

    def body() -> NoReturn:
        syscalls.set_name("insula-warm")
        init.sanitize(args, plan)
        premounts = init.setup_namespaces(plan, premount_plan, args)
        if premounts:
            step(Steps.LEAVE_HOST, leave_host, premounts)
            args.pivot = False  # done
        send(args.sync, {"event": "parked"})
        assignment = Assignment.receive(args.sync)
        if assignment is None:
            os._exit(INTERRUPTED)
        config = assignment.read_config()
        args.sources.mounts |= assignment.sources.mounts
        args.sources.devices |= assignment.sources.devices
        args.root, args.stdio = assignment.root, assignment.stdio
        args.program, args.tty = assignment.read_program(), bool(config["process"].get("terminal"))
        init.exec_program(config, args, plan, premounts)

    init.send_errors(args, body)
