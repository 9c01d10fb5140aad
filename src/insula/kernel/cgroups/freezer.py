"""Stop and go: every process of a group is taken off the processors, without being told.

Unlike SIGSTOP, which a parent sees and anyone of the same user can undo, this can be noticed and undone from outside
only. Version 2 has cgroup.freeze, and tells in cgroup.events when all stand still. Version 1 has a controller for it
(the kernel's freezer-subsystem.rst): its state is FREEZING until the last process has come by, and may stay so for
ever if processes fork meanwhile, unless it is asked again.
"""

from __future__ import annotations

import errno
import os
import select
import time

from insula.kernel.cgroups.files import fields, read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.kernel.cgroups.group import Cgroup

_PAUSE = 0.002


def freeze(group: Cgroup, timeout: float) -> None:
    """See `Cgroup.freeze`."""
    deadline = time.monotonic() + timeout
    (_freeze_v2 if group.tree.unified else _freeze_v1)(group, deadline)
    if not _all_stand_still(group):
        thaw(group)
        raise OSError(errno.ETIMEDOUT, f"not all processes of the group stand still in {timeout:g} s", group.path)


def _freeze_v1(group: Cgroup, deadline: float) -> None:
    state = _v1_file(group)
    write(state, "FROZEN")
    while not _all_stand_still(group) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
        write(state, "FROZEN")  # catches what was forked since


def _freeze_v2(group: Cgroup, deadline: float) -> None:
    write(f"{group.directory('')}/cgroup.freeze", 1)
    events = os.open(f"{group.directory('')}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        changed = select.poll()
        changed.register(events, select.POLLPRI)
        while not _all_stand_still(group) and (left := deadline - time.monotonic()) > 0:
            changed.poll(min(left, 0.1) * 1000)
    finally:
        os.close(events)


def thaw(group: Cgroup) -> None:
    """See `Cgroup.thaw`."""
    try:
        if group.tree.unified:
            write(f"{group.directory('')}/cgroup.freeze", 0)
        else:
            write(_v1_file(group), "THAWED")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # it was removed
            raise


def take_back(group: Cgroup, pid: int) -> None:
    """See `Cgroup.take_back`."""
    if not group.tree.unified:
        write(f"{group.directory('freezer')}/cgroup.procs", pid)


def frozen(group: Cgroup) -> bool:
    """See `Cgroup.frozen`."""
    if group.tree.unified:
        return read(f"{group.directory('')}/cgroup.freeze") == "1" or _all_stand_still(group)
    return read(_v1_file(group)) in ("FROZEN", "FREEZING")


def frozen_elsewhere(pid: int) -> str | None:
    """The path of the group that freezes a process on version 1, whatever its other groups are; None if none does."""
    try:
        with open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except (FileNotFoundError, ProcessLookupError):
        return None
    from insula.kernel.cgroups.group import Cgroup

    path = next((path for _, controllers, path in lines if "freezer" in controllers.split(",")), None)
    return None if path is None else Cgroup(path.lstrip("/")).frozen_at()


def _all_stand_still(group: Cgroup) -> bool:
    if group.tree.unified:
        return fields(f"{group.directory('')}/cgroup.events").get("frozen") == 1
    return read(_v1_file(group)) == "FROZEN"


def _v1_file(group: Cgroup) -> str:
    return f"{group.directory('freezer')}/freezer.state"
