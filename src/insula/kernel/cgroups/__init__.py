"""Control groups: what a group of processes may use, and what it used; cgroups(7).

A group is a directory, its limits are files in it, and a process is in it because its PID was written into another
file there. There are two versions of this interface. Version 1 has a tree of directories for each controller (memory,
cpu, pids, …), version 2 one tree for all. A host has one or the other for any controller; `hybrid` hosts mount a
version 2 tree without controllers beside version 1. Here a group has one path, such as ``insula/acme/4f…``, and the
files behind it are found for either version. What may be used is said as the OCI runtime-spec says it
(config-linux.md, `linux.resources`), whose words are those of version 1.

    hierarchy.py   which trees there are, where a process is, where a container's `cgroupsPath` leads
    group.py       `Cgroup`: make, join, limit, freeze, kill, remove
    files.py       reading and writing them
    settings.py    a limit is a value for a file; writing many in whatever order the kernel accepts; taking them back
    v1.py, v2.py   from `linux.resources` to the settings of each version
    devices.py     device rules: what a list of them means; the files of version 1
    device_program.py   the same as an eBPF program, which version 2 takes instead
    cpuset.py      version 1's processor sets, which begin empty
    freezer.py     stop and go
    stats.py       what was used, and who waited for what (pressure stall information)
    delegation.py  to give a group to a user, who divides what it has
    events.py      to be told that memory ran out
    systemd.py     on hosts where systemd keeps the tree, a scope is asked from it
"""

from __future__ import annotations

from insula.kernel.cgroups.group import Cgroup, join
from insula.kernel.cgroups.hierarchy import ROOT, Hierarchy, detect, hierarchy, locate, of_process
from insula.kernel.cgroups.settings import Resources

__all__ = ["ROOT", "Cgroup", "Hierarchy", "Resources", "detect", "hierarchy", "join", "locate", "of_process"]
