"""Delegation: a control group is given to a user, who may divide what it has and not change how much that is.

cgroups(7) says how on version 2: the user gets the directory, so that he can make groups in it, and the few files
that move processes and hand controllers down (the kernel lists them in /sys/kernel/cgroup/delegate). The files with
the limits stay root's. Version 1 was never meant for this: nothing bounds the number of groups there, and the IDs of
memory groups run out for the whole host.

A container that may divide its group moves its processes into groups below, for on version 2 a group that hands down
controllers has no processes of its own. Who joins such a container joins where its first process is.
"""

from __future__ import annotations

import os

from insula.kernel.cgroups import files

_DEPTH = 64  # groups within each other; systemd, Docker and Kubernetes need less than 10
_LIST = "/sys/kernel/cgroup/delegate"
_FILES = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")
"""Where the kernel has no list, before Linux 4.15."""


def give(directory: str, uid: int) -> None:
    """Give the group of version 2 at `directory` to a user of the host. OSError."""
    os.chown(directory, uid, -1)
    for name in _files():
        try:
            os.chown(f"{directory}/{name}", uid, -1)
        except FileNotFoundError:  # of a controller that the group lacks
            continue
    # stays root's: groups nested deeper than a path is long could not be removed any more
    files.write(f"{directory}/cgroup.max.depth", _DEPTH)


def _files() -> tuple[str, ...]:
    try:
        with open(_LIST) as file:
            return tuple(name for name in file.read().split() if "/" not in name)
    except FileNotFoundError:
        return _FILES


def asked_for(config: dict[str, object], namespaced: bool) -> bool:
    """Whether an OCI config.json is for a delegated group (runtime-spec, config-linux.md, "Cgroup ownership"): one with
    a cgroup namespace of its own and a cgroup file system that can be written to."""
    mounts = config.get("mounts")
    for mount in mounts if isinstance(mounts, list) else ():
        if mount.get("type") in ("cgroup", "cgroup2"):
            return namespaced and "ro" not in (mount.get("options") or ())
    return False
