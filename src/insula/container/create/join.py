"""Join a running container with another process, for `exec` (setns(2)).

setns with a pidfd joins all namespaces of a process at once. A PID namespace is entered only by later children, so the
process that joins forks once more. The second process has a PID inside, and CLONE_PARENT makes it a child of the
parent, which can wait for it. Until execve(2) it runs the host's Python in view of the container. So it is made
undumpable first: no process inside may trace it, or read its memory, files or program through /proc/PID (CVE-2019-5736,
CVE-2024-21626).
"""

from __future__ import annotations

import os

from insula.container import wire
from insula.container.create.exec_process import exec_process
from insula.container.create.init import become_root, offer_listener
from insula.container.create.stdio import connect_stdio, open_terminal, plain_lines, take_terminal
from insula.container.create.steps import (
    StepError,
    Steps,
    close_others,
    forbid_imports,
    reset_signals,
    send,
    send_error,
    step,
)
from insula.kernel import cgroups, process, scheduling, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from insula.container.create.exec_process import Filter
    from insula.model.cpython import socket

ALL = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
    | syscalls.CLONE_NEWPID
)
"""The namespaces of the engine's containers."""


class ExecArgs:
    """The arguments of a process that joins a container: `target` is a pidfd of a process in it, `join` has the
    descriptors of `Cgroup.open`, and `flags` the namespaces that differ from the caller's.

    `root` is the directory that is the container's root, where that is not its mount namespace's (-1: it is); `keep`
    descriptors from 3 on are passed to the program; `personality` and `memory_policy` as in the
    container's config.
    """

    def __init__(
        self,
        what: dict[str, Any],
        target: int,
        sync: socket.socket,
        join: list[int],
        stdio: list[int],
        program: Filter | None,
        *,
        flags: int = ALL,
        root: int = -1,
        keep: int = 0,
        personality: dict[str, Any] | None = None,
        memory_policy: dict[str, Any] | None = None,
        plain: bool = False,
    ) -> None:
        self.process, self.target, self.sync, self.join, self.stdio = what, target, sync, join, stdio
        self.program, self.flags, self.root, self.keep, self.personality = program, flags, root, keep, personality
        self.memory_policy = memory_policy
        self.plain = plain  # the terminal leaves lines as they are: set before the program can write one

    def descriptors(self) -> list[int]:
        kept = [self.target, self.sync.fileno(), *self.join, *self.stdio, *range(3, 3 + self.keep)]
        return [*kept, self.root] if self.root >= 0 else kept


def main(args: ExecArgs) -> NoReturn:
    """Run in the child: join the namespaces of the target, fork into them, and exit. It never returns."""
    sync = args.sync
    try:
        forbid_imports()
        reset_signals()
        close_others(args.descriptors())
        step(Steps.HIDE, syscalls.prctl, syscalls.PR_SET_DUMPABLE, 0)
        if (score := args.process.get("oomScoreAdj")) is not None:  # while it has the right to lower it for good
            step(Steps.SET_OOM_SCORE, process.set_oom_score, os.getpid(), score)
        if initial := (args.process.get("execCPUAffinity") or {}).get("initial"):
            step(Steps.SET_AFFINITY, scheduling.set_affinity, initial)
        step(Steps.JOIN_CGROUP, cgroups.join, args.join)
        if args.flags:
            step(Steps.JOIN_NAMESPACES, syscalls.setns, args.target, args.flags)
        pid, _ = fork_inside()
        if pid:
            wire.send(sync, {"event": "forked", "pid": pid})
            os._exit(0)
        _inside(args)
    except StepError as error:
        send_error(sync, error)
    except OSError as error:
        send_error(sync, StepError(Steps.JOIN_CONTAINER, error))
    finally:
        os._exit(125)


def fork_inside() -> tuple[int, int]:
    """clone3(2) into the namespaces that were joined. StepError names the limit that was reached."""
    try:
        return syscalls.clone3(syscalls.CLONE_PARENT)
    except BlockingIOError as error:
        why = OSError(error.errno, "the limit of processes is reached (pids of the container, or of what it is in)")
        raise StepError(Steps.START_PROCESS, why) from None


def _inside(args: ExecArgs) -> NoReturn:
    """In the second process, whose PID is of the container: set up the streams, and execute the program."""
    what, sync = args.process, args.sync
    step(Steps.BECOME_ROOT, become_root)
    step(Steps.HIDE, syscalls.prctl, syscalls.PR_SET_DUMPABLE, 0)
    step(Steps.LEAVE_KEYRING, syscalls.join_session_keyring)
    step(Steps.START_SESSION, os.setsid)
    if args.root >= 0:
        step(Steps.ENTER_ROOT, enter, args.root)
    if what.get("terminal"):
        master, slave = make_terminal(what)
        if args.plain:
            step(Steps.SET_UP_TERMINAL, plain_lines, slave)
        wire.send(sync, {"event": "terminal"}, [master])
        os.close(master)
        step(Steps.OPEN_TERMINAL, take_terminal, slave)
    else:
        step(Steps.CONNECT_STREAMS, connect_stdio, args.stdio)
    exec_process(
        what,
        args.program,
        args.keep,
        personality=args.personality,
        memory_policy=args.memory_policy,
        joins=True,
        listener=lambda fd: offer_listener(sync.fileno(), fd),
        warn=lambda text: send(sync, {"event": "warning", "message": text}),
    )


def make_terminal(what: dict[str, Any]) -> tuple[int, int]:
    """Open both sides of a terminal of the container's own devpts. StepError if it has none."""
    try:
        return open_terminal(what)
    except OSError as error:
        raise StepError(Steps.OPEN_TERMINAL, error) from None


def enter(root: int) -> None:
    """Make the directory behind `root` the root (chroot(2))."""
    os.fchdir(root)
    os.chroot(".")
    os.chdir("/")
