"""Create PID 1 of a container, from the parent's side: the parts that take the host's rights, and the clone.

Before the clone the parent makes the control group with its limits, the root, /dev with real device nodes, bind mounts
of the host's files, and streams. All but the control group are descriptors. If a step fails, they are closed and
nothing is left; the control group is removed.

The zygote of the service calls `spawn` with an overlay and pipes (`insula.container.service.launch`), `insula-oci` with
a directory of the host and its own streams. Everything else comes from the config (OCI runtime-spec).
"""

from __future__ import annotations

import os

from insula.container import wire
from insula.container.create import init, namespaces, sources
from insula.container.create.cgroup_mount import Groups, own_directories
from insula.kernel import process, scheduling, syscalls
from insula.kernel.cgroups import delegation
from insula.kernel.rollback import Rollback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.container.create.exec_process import Filter
    from insula.kernel.cgroups import Cgroup
    from insula.model.cpython import socket


class SpawnedProcess:
    """A new process: its pid and pidfd, our end of the channel to it, its namespaces, and our ends of its streams."""

    __slots__ = ("pid", "pidfd", "plan", "start_time", "streams", "sync")

    def __init__(self, pid: int, pidfd: int, sync: socket.socket, plan: namespaces.Plan | None = None) -> None:
        self.plan = plan
        self.pid = pid
        self.pidfd = pidfd
        self.start_time = process.start_time(pid) or 0
        self.sync = sync
        self.streams: dict[str, int] = {}  # "stdin", "stdout", "stderr"


class SpawnOptions:
    """The parameters of a container that are not in its config.

    `root` is a detached mount, `stdio` the child's streams (-1 is /dev/null; none with a terminal). `owner` is the user
    of the host for whom the user namespace is made. `keep` descriptors from 3 on are passed to the program, or else
    those in `inherit`, as 3 and so on. `share` is
    the first process, as PID and start time, of a container whose user and PID namespaces are joined.

    `in_order`: the mounts are made strictly in the listed order, as /proc/self/mountinfo shows them, and the root is
    attached at its path. Then the caller answers the child's requests (`sources.answer`) until it is ready. Without it
    bind mounts are opened at once, and /proc, /sys and /dev are mounted first, as for a warm container.
    """

    def __init__(
        self,
        *,
        root: int,
        stdio: list[int],
        program: Filter | None = None,
        owner: int = 0,
        keep: int = 0,
        inherit: list[int] | None = None,
        pivot: bool = True,
        keyring: bool = True,
        share: tuple[int, int] | None = None,
        in_order: bool = False,
        waits_at: socket.socket | None = None,
        notify_at: str = "",
        state: dict[str, Any] | None = None,
    ) -> None:
        self.root, self.stdio, self.program, self.owner = root, stdio, program, owner
        self.keep, self.inherit, self.pivot, self.keyring, self.share = keep, inherit or [], pivot, keyring, share
        self.in_order, self.waits_at, self.notify_at, self.state = in_order, waits_at, notify_at, state


def spawn(config: dict[str, Any], group: Cgroup | None, outside: SpawnOptions) -> SpawnedProcess:
    """Make a container's first process, which waits for the message "mapped" (see `insula.container.create.init`).

    `group` is its control group. OSError or StepError if anything is refused; then nothing of it is left.
    """
    own = config["linux"]
    _load(config)
    if outside.notify_at:
        from insula.container.create import sd_notify  # noqa: F401
    with Rollback() as undo, Rollback() as child_fds:  # what only the child needs is closed here in any case
        plan = namespaces.plan(own, child_fds, outside.share)
        into: int | None = None
        join: list[int] = []
        if group is not None:
            group.create()
            undo.callback(group.remove)
            group.limit(own.get("resources") or {})
            if delegation.is_requested(config, plan.cgroup):
                group.delegate(plan.outside((config["process"].get("user") or {}).get("uid", 0), 0)[0])
            into, join = enter_group(group, child_fds)
            if outside.in_order and (beside := group.open_beside()) is not None:
                into = child_fds.hold(beside)
        opened = sources.open_later(config, plan) if outside.in_order else sources.open_all(config, plan)
        child_fds.callback(opened.close)
        ours, theirs = wire.pair()
        undo.callback(ours.close)
        child_fds.callback(theirs.close)
        args = init.InitArgs(
            sync=theirs,
            root=outside.root,
            sources=opened,
            join=join,
            groups=Groups(group.directories() if group else own_directories(), plan.cgroup),
            stdio=outside.stdio,
            program=outside.program,
            tty=bool(config["process"].get("terminal")),
            keep=outside.keep,
            inherit=outside.inherit,
            pivot=outside.pivot,
            keyring=outside.keyring,
            in_order=outside.in_order,
            waits_at=outside.waits_at,
            notify_at=outside.notify_at,
            state=outside.state,
        )
        bundle = child_fds.hold(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        if outside.in_order:  # a new mount namespace translates it, and no right is needed to be there
            os.chdir(config["root"]["path"])
        pid, pidfd = clone(plan, outside.owner, into)
        if pid == 0:
            init.main(config, args, plan)
        os.fchdir(bundle)
        undo.hold(pidfd)
        if plan.makes(syscalls.CLONE_NEWUSER):
            process.map_ids(pid, plan.uids, plan.gids)
            scheduling.set_for_child(config["process"], pid)  # a real-time policy takes CAP_SYS_NICE of the host
        if (score := config["process"].get("oomScoreAdj")) is not None:
            process.set_oom_score(pid, score)
        undo.keep()
        return SpawnedProcess(pid, pidfd, ours, plan)


def _load(config: dict[str, Any]) -> None:
    """Import modules that only some containers need: their child can import no more."""
    if config.get("hooks"):
        from insula.container.create import hooks  # noqa: F401
    if (config["linux"].get("seccomp") or {}).get("listenerPath"):
        from insula.container.create import notify  # noqa: F401
    if any("tmpcopyup" in (entry.get("options") or ()) for entry in config.get("mounts") or ()):
        from insula.container.create import copy_up  # noqa: F401


def enter_group(group: Cgroup, child_fds: Rollback) -> tuple[int | None, list[int]]:
    """A descriptor for clone3(2) into the group (version 2), and descriptors for the child to join by (version 1)."""
    if group.tree.unified:
        return child_fds.hold(os.open(group.directories()[""], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)), []
    return None, [child_fds.hold(fd) for fd in group.open()]


def clone(plan: namespaces.Plan, owner: int, group: int | None) -> tuple[int, int]:
    """Call `namespaces.clone` with the effective user `owner` of the host, which then owns the user namespace."""
    # limits per user (inotify, queued signals, message queues) are also counted for the owner of the user namespace:
    # if that were root, one tenant could use up the host's limits
    if not owner:
        return namespaces.clone(plan, group)
    os.seteuid(owner)
    pid = -1
    try:
        pid, pidfd = namespaces.clone(plan, group)
    finally:
        if pid:  # in the child, no ID is mapped yet
            os.seteuid(0)
    return pid, pidfd
