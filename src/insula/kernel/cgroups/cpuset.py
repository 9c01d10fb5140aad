"""Processor and memory node sets of version 1, which begin empty: cpuset(7).

A new group of any other controller has no limit of its own. A new cpuset has no processor and no memory, and a process
that is moved there is refused with ENOSPC. So each level is given what its parent has, from the top down, where it has
nothing yet. In version 2 an empty set means the parent's, and there is nothing to do.
"""

from __future__ import annotations

from insula.kernel.cgroups.files import read, write


def inherit(top: str, path: str) -> None:
    """Fill the empty sets on the way from the hierarchy's mount `top` to the group at `path`. OSError."""
    directory = top
    for part in path.split("/"):
        parent, directory = directory, f"{directory}/{part}"
        for file in ("cpuset.cpus", "cpuset.mems"):
            if not read(f"{directory}/{file}"):
                write(f"{directory}/{file}", read(f"{parent}/{file}"))
