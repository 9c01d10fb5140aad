"""Real-time budgets of version 1 (the kernel's scheduler/sched-rt-group.rst).

A new group may run real-time tasks for 0 microseconds in each period. The budget of a group must be at least the sum of
its children's, at every level. Version 2 has no such budgets.
"""

from __future__ import annotations

import errno

from insula.kernel.cgroups.files import read, write


def raise_budgets(top: str, path: str, runtime: int, period: int) -> None:
    """Raise the budgets of all groups above `path`, below the hierarchy's mount `top`, by `runtime` in each `period`.

    Both are in microseconds. The budget of the mount itself is the host's and stays unchanged. OSError if the kernel
    refuses.
    """
    directory = top
    for part in path.split("/")[:-1]:
        directory = f"{directory}/{part}"
        own_period, own = (int(read(f"{directory}/cpu.rt_{name}_us") or 0) for name in ("period", "runtime"))
        more = -(-runtime * own_period // period)
        try:
            write(f"{directory}/cpu.rt_runtime_us", own + more)
        except OSError as error:
            what = "linux.resources.cpu.realtimeRuntime: the budget of a parent group cannot be raised that far"
            raise OSError(error.errno or errno.EINVAL, what, directory) from None
