"""Control groups: limits and accounting for a set of processes; cgroups(7).

A group is a directory. Its limits are files in it, and a process is in it because its PID was written into another file
there. There are two versions of this interface. Version 1 has a tree of directories for each controller (memory, cpu,
pids, …), version 2 one tree for all. A host has one or the other for any controller; a *hybrid* host mounts a version 2
tree without controllers beside version 1. Here a group has one path, such as ``insula/acme/4f…``, and `Cgroup(path)`
finds the files behind it. Limits are given as `linux.resources` of the OCI runtime-spec (config-linux.md), whose terms
are those of version 1.

    base.py             `Cgroup`: the interface, and the common parts of both versions
    v1.py, v2.py        the class for each version; the first group imports the one of this host
    hierarchy.py        the mounted trees, the group of a process, and where a container's `cgroupsPath` leads
    files.py            reading and writing a group's files
    resources_v1.py, resources_v2.py   from `linux.resources` to the files of each version
    settings.py         values for files: writing them in an order that the kernel accepts, and restoring them
    devices.py          device rules
    device_list.py      device rules as the files of version 1
    device_program.py   device rules as an eBPF program, for version 2
    cpuset.py, realtime.py   processor sets and real-time budgets of version 1, which a group gets from its parents
    stats.py            usage, and pressure stall information
    delegation.py       delegating a group of version 2 to a user
    events.py           notifications that memory ran out
    systemd.py          scopes, on hosts where systemd manages the tree
"""

from __future__ import annotations

from insula.kernel.cgroups.base import Cgroup, join
from insula.kernel.cgroups.hierarchy import ROOT, Hierarchy, detect, hierarchy, locate, of_process
from insula.kernel.cgroups.settings import Resources

__all__ = [
    "ROOT",
    "Cgroup",
    "Hierarchy",
    "Resources",
    "detect",
    "hierarchy",
    "join",
    "locate",
    "of_process",
]
