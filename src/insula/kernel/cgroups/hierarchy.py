"""The mounted cgroup hierarchies of this host, and the paths of groups in them; cgroups(7)."""

from __future__ import annotations

ROOT = "/sys/fs/cgroup"

BASE = ("cpu", "cpuacct", "memory", "pids", "devices", "freezer", "blkio")
"""The version 1 controllers in which every group has a directory."""

ON_DEMAND = ("cpuset", "hugetlb", "net_cls", "net_prio", "rdma")
"""The version 1 controllers in which a group gets a directory when one of their limits is first set."""

RELATIVE_TO = "insula-oci"
"""The group below which `insula-oci` puts a container whose config has a relative cgroupsPath, or none."""


class Hierarchy:
    """The mount points: `unified` of version 2, else `controllers` of version 1, one for each.

    `beside` is the version 2 mount of a hybrid host, which has no controllers.
    """

    __slots__ = ("beside", "controllers", "unified")

    def __init__(self, unified: str | None, controllers: dict[str, str], beside: str | None = None) -> None:
        self.unified = unified
        self.controllers = controllers
        self.beside = beside

    @property
    def version(self) -> int:
        return 2 if self.unified else 1


def detect(mounts: str = "/proc/self/mounts") -> Hierarchy:
    """Read the mounts: version 1 if the memory controller is mounted as version 1, else version 2."""
    mounted: dict[str, tuple[str, str]] = {}
    with open(mounts, errors="surrogateescape") as file:
        for line in file:
            _, target, fstype, options, *_ = line.split()
            mounted[target] = fstype, options  # a later mount hides an earlier one at the same path
    controllers: dict[str, str] = {}
    unified = None
    for target, (fstype, options) in mounted.items():
        if fstype == "cgroup2":
            unified = unified or target
        elif fstype == "cgroup":
            for option in options.split(","):
                if option in BASE or option in ON_DEMAND:
                    controllers.setdefault(option, target)
    if "memory" in controllers:
        return Hierarchy(None, controllers, unified)
    return Hierarchy(unified, {})


_hierarchy: Hierarchy | None = None


def hierarchy() -> Hierarchy:
    """Return the result of `detect`, cached."""
    global _hierarchy
    if _hierarchy is None:
        _hierarchy = detect()
    return _hierarchy


def of_process(pid: int) -> str | None:
    """Return the path of the group of `pid` (/proc/PID/cgroup, cgroups(7)); None if the process is gone."""
    try:
        with open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:  # a process may name its groups
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except (FileNotFoundError, ProcessLookupError):
        return None
    wanted = "" if hierarchy().unified else "pids"
    for _, controllers, path in lines:
        if wanted in controllers.split(","):
            return path.lstrip("/")
    return None


def locate(cgroups_path: str | None, container: str) -> str:
    """Convert `linux.cgroupsPath` (config-linux.md) to the path for `Cgroup`.

    An absolute path is relative to the mount, a relative one to `ROOT`; without one it is the container's ID in `ROOT`.
    ValueError if it leads out of the tree.
    """
    path = cgroups_path or container
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in path:
        raise ValueError(f"linux.cgroupsPath: {path!r} is no path of a control group")
    return "/".join(parts if path.startswith("/") else [RELATIVE_TO, *parts])
