"""Where control groups are: the mounted hierarchies of this host, and the paths of groups in them; cgroups(7)."""

from __future__ import annotations

ROOT = "/sys/fs/cgroup"

BASE = ("cpu", "cpuacct", "memory", "pids", "devices", "freezer", "blkio")
"""The version 1 controllers that every group has a directory in."""

ON_DEMAND = ("cpuset", "hugetlb", "net_cls", "net_prio", "rdma")
"""Those that a group gets a directory in when a limit of theirs is set first."""

RELATIVE_TO = "insula-oci"
"""The group below which `insula-oci` puts a container whose config has a relative cgroupsPath, or none."""


class Hierarchy:
    """Where the controllers are: version 2 if `unified`, else a directory for each version 1 controller.

    `beside` is the mount of version 2 on a hybrid host, whose controllers are all those of version 1.
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
    """Read the mounts: version 1 wherever the memory controller is mounted so, else version 2."""
    mounted: dict[str, tuple[str, str]] = {}
    with open(mounts, errors="surrogateescape") as file:
        for line in file:
            _, target, fstype, options, *_ = line.split()
            mounted[target] = fstype, options  # a later mount hides an earlier one in the same place
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
    """`detect()`, once."""
    global _hierarchy
    if _hierarchy is None:
        _hierarchy = detect()
    return _hierarchy


def of_process(pid: int) -> str | None:
    """The path of the group that `pid` is in (cgroups(7), /proc/PID/cgroup); None if the process is gone."""
    try:
        with open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:  # who may nest names groups
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except (FileNotFoundError, ProcessLookupError):
        return None
    wanted = "" if hierarchy().unified else "pids"
    for _, controllers, path in lines:
        if wanted in controllers.split(","):
            return path.lstrip("/")
    return None


def locate(cgroups_path: str | None, container: str) -> str:
    """The path for `Cgroup` that `linux.cgroupsPath` means (config-linux.md): an absolute one counts from the mount,
    a relative one from a group of the runtime, and without one the container's ID is its name there.

    ValueError if it would lead out of the tree.
    """
    path = cgroups_path or container
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in path:
        raise ValueError(f"linux.cgroupsPath: {path!r} is no path of a control group")
    return "/".join(parts if path.startswith("/") else [RELATIVE_TO, *parts])
