"""Delegation of a version 2 control group to a user, which may make groups below it and not change its limits.

As cgroups(7) describes, the user becomes the owner of the directory, and of the few files that move processes and
enable controllers (the kernel lists them in /sys/kernel/cgroup/delegate). The files with the limits stay root's.
Version 1 groups are not delegated: nothing limits the number of subgroups there, and the IDs of memory groups, which
the whole host shares, would run out.

A container with a delegated group moves its processes into subgroups, because a version 2 group that enables
controllers for its children can't have processes itself. A process that joins such a container joins the subgroup of
its first process.
"""

from __future__ import annotations

import os

from insula.kernel.cgroups import files

_DEPTH = 64  # of nested groups; systemd, Docker and Kubernetes need less than 10
_LIST = "/sys/kernel/cgroup/delegate"
_FILES = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")
"""The files to delegate before Linux 4.15, which has no list."""


def delegate(directory: str, uid: int) -> None:
    """Delegate the group of version 2 at `directory` to a user of the host. OSError."""
    os.chown(directory, uid, -1)
    for name in _files():
        try:
            os.chown(f"{directory}/{name}", uid, -1)
        except FileNotFoundError:  # a file of a controller that the group lacks
            continue
    # this file stays root's: groups nested deeper than PATH_MAX could not be removed
    files.write(f"{directory}/cgroup.max.depth", _DEPTH)


def _files() -> tuple[str, ...]:
    try:
        with open(_LIST) as file:
            return tuple(name for name in file.read().split() if "/" not in name)
    except FileNotFoundError:
        return _FILES


def is_requested(config: dict[str, object], namespaced: bool) -> bool:
    """Whether an OCI config.json requests a delegated group (runtime-spec, config-linux.md, "Cgroup ownership").

    It does with a cgroup namespace of its own (`namespaced`) and a writable cgroup file system.
    """
    mounts = config.get("mounts")
    for mount in mounts if isinstance(mounts, list) else ():
        if mount.get("type") in ("cgroup", "cgroup2"):
            return namespaced and "ro" not in (mount.get("options") or ())
    return False
