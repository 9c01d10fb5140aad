"""Files in and out of the machine, as tar streams (`insula.container.archive`).

A process for each copy does what one does for a container on a host, with the root of the first program. It is a
session like that of a program: the archive is its input or output, and an error comes as JSON on its standard error.
"""

from __future__ import annotations

import os

from insula.agent.programs import RunningProgram, streams
from insula.container.create.steps import StepError, Steps
from insula.kernel import process, syscalls
from insula.kernel.rollback import Rollback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


def copy(request: dict[str, Any], first: RunningProgram, program: RunningProgram) -> None:
    """Start to copy: `archive` is the verb, with `path` and `copy`. StepError if there is no program whose files they
    could be."""
    if first.status is not None or first.pid == 0:
        raise StepError(Steps.JOIN_CONTAINER, OSError(3, "its first program has ended"))
    started = process.start_time(first.pid) or 0
    with Rollback() as child_fds:
        stdio = streams({}, program, child_fds)
        pid, pidfd = syscalls.clone3(0)
        if pid == 0:
            _main(request, first.pid, started, stdio)
        program.adopt(pid, pidfd)
    program.reply()


def _main(request: dict[str, Any], pid: int, started: int, stdio: list[int]) -> NoReturn:
    """Be the process that copies, with the agent's memory and without its loop."""
    status = 1
    try:
        for number, fd in enumerate(stdio):
            os.dup2(fd, number)
        os.closerange(3, 1 << 16)
        from insula.container.archive import carry_out

        carry_out(request["archive"], pid, started, request["path"], request["copy"], lambda *_: None)
        status = 0
    finally:
        os._exit(status)
