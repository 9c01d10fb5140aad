"""The process that waits to become the first program of a machine that is a copy.

What is alike in most programs' containers is done before the template is taken, so that no copy has to do it: control
group, namespaces, /proc, /sys and /dev (`insula.container.create.warm`). The host says what they have in common: the
OCI config of a usual program. A program whose config differs in that is started as in a machine that was booted.
"""

from __future__ import annotations

import os

from insula.agent import early
from insula.container import wire
from insula.container.create import init, namespaces, sources, spawn
from insula.container.create.cgroup_mount import Groups
from insula.container.create.rootfs import PremountPlan
from insula.container.create.warm import Assignment, wait_for_assignment
from insula.kernel.rollback import Rollback
from insula.model.cpython import dumps, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.kernel.cgroups import Cgroup


class WarmProcess:
    """A process that waits, in the control group `group`, for a program whose config is like `config`."""

    def __init__(self, config: dict[str, Any], group: Cgroup) -> None:
        """Make it. OSError, StepError."""
        self._common = config["mounts"], config["linux"]
        self.group = group
        with Rollback() as child_fds:
            group.create()
            into, join = spawn.enter_group(group, child_fds)
            plan = namespaces.plan(config["linux"], child_fds)
            premounts = PremountPlan(config)
            opened = sources.open_all(config, plan)
            child_fds.callback(opened.close)
            self.sync, theirs = wire.pair()
            child_fds.callback(theirs.close)
            groups = Groups(group.directories(), plan.cgroup)
            args = init.InitArgs(sync=theirs, root=-1, sources=opened, join=join, groups=groups, stdio=[], program=None)
            self.pid, self.pidfd = spawn.clone(plan, 0, into)
            if self.pid == 0:
                early.populate()
                wait_for_assignment(premounts, args, plan)
        wire.send(self.sync, {"event": "mapped"})
        wire.receive(self.sync)  # that it waits

    def fits(self, config: dict[str, Any]) -> bool:
        """Whether it can become the program of this config."""
        return (config["mounts"], config["linux"]) == self._common

    def assign(self, config: dict[str, Any], root: int, stdio: list[int]) -> None:
        """Have it become a program. `root` is a detached mount, and `stdio` its streams. OSError."""
        file = os.memfd_create("config", os.MFD_CLOEXEC)
        try:
            os.write(file, dumps({"config": config}).encode())
            nothing = sources.PreparedMounts()
            Assignment(config=file, program=-1, flags=0, root=root, sources=nothing, stdio=stdio).send(self.sync)
        finally:
            os.close(file)

    def discard(self) -> None:
        """End it, and remove its control group."""
        self.sync.close()
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.group.remove()
