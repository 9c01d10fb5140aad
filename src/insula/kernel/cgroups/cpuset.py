"""Processor and memory node sets of version 1, which are empty at first: cpuset(7).

A new group of any other controller has no limits. A new cpuset has no processors and no memory nodes, and moving a
process there fails with ENOSPC. So each level with empty sets is given its parent's, from the top down. In version 2 an
empty set means the parent's, and nothing has to be done.
"""

from __future__ import annotations

from insula.kernel.cgroups.files import read, write


def inherit(top: str, path: str) -> None:
    """Fill empty sets of all groups from the hierarchy's mount `top` down to the group at `path`. OSError."""
    directory = top
    for part in path.split("/"):
        parent, directory = directory, f"{directory}/{part}"
        for file in ("cpuset.cpus", "cpuset.mems"):
            if not read(f"{directory}/{file}"):
                write(f"{directory}/{file}", read(f"{parent}/{file}"))
