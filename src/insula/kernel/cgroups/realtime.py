"""Real-time scheduling in version 1 (the kernel's scheduler/sched-rt-group.rst): a group has what those above leave it.

A new group may run real-time tasks for 0 microseconds a period. Its parent must have at least what its children have
together, and so must the parent's own. In version 2 there is nothing like it.
"""

from __future__ import annotations

import errno

from insula.kernel.cgroups.files import read, write


def hand_down(top: str, path: str, runtime: int, period: int) -> None:
    """Raise the groups above `path`, from the hierarchy's mount `top` down, by `runtime` of each `period`, both in us.

    The mount itself, which has what the host allows, stays as it is. OSError if a group is refused so much.
    """
    directory = top
    for part in path.split("/")[:-1]:
        directory = f"{directory}/{part}"
        own_period, own = (int(read(f"{directory}/cpu.rt_{name}_us") or 0) for name in ("period", "runtime"))
        more = -(-runtime * own_period // period)
        try:
            write(f"{directory}/cpu.rt_runtime_us", own + more)
        except OSError as error:
            what = "linux.resources.cpu.realtimeRuntime: a group above cannot have so much"
            raise OSError(error.errno or errno.EINVAL, what, directory) from None
