"""The zygote's record of a process that it forked."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from insula.container import wire
    from insula.container.service.run_directory import ProcessState
    from insula.model.cpython import socket

    Reply: TypeAlias = "Callable[[wire.Message], None]"


class Child:
    """A process from its fork to its end. `exec_id` is None for PID 1."""

    def __init__(self, container: str, exec_id: str | None, sync: socket.socket, pid: int, pidfd: int) -> None:
        self.container = container
        self.exec_id = exec_id
        self.sync: socket.socket | None = sync
        self.pid = pid
        self.pidfd = pidfd
        self.reply: Reply | None = None
        self.error: wire.Message | None = None
        self.start_requested = False  # to become the program
        self.state: ProcessState | None = None  # as recorded
        self.cgroup: str | None = None
        self.mounts = -1  # its mount namespace
