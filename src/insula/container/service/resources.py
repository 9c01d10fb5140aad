"""What a container that runs may use, and whether it may run at all: its control group's business (cgroups(7)).

Limits are files that may be written at any time, and hold from then on. Freezing takes every process of the group off
the processors, wherever it is, without telling it: unlike SIGSTOP, which a parent or a shell would notice, and which a
process inside could undo. Version 2 has a file for it (cgroup.freeze), version 1 a controller of its own
(freezer-subsystem.rst), whose frozen processes do not even die: who kills one must thaw it too.
"""

from __future__ import annotations

from insula.container.service.run_directory import RunDirectory
from insula.kernel.cgroups import Cgroup
from insula.model.errors import Failed, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def update(directory: RunDirectory, limits: dict[str, Any]) -> None:
    """Change limits (`linux.resources` of the OCI runtime-spec); what is absent stays as it is.

    `Failed` when the kernel refuses one: then all are as they were. `NotFound` if the container is gone.
    """
    group = _group(directory)
    try:
        group.update(limits)
    except OSError as error:
        raise _explain(group, "the kernel refuses these limits", error) from error


def pause(directory: RunDirectory) -> None:
    """Freeze all of its processes. `Failed` if that comes to no end: then none is. `NotFound` if it is gone."""
    group = _group(directory)
    try:
        group.freeze()
    except OSError as error:
        raise _explain(group, "it can't be frozen", error) from error


def resume(directory: RunDirectory) -> None:
    """Let them go on; nothing happens if they are not frozen, or gone."""
    try:
        group = _group(directory)
        if group.frozen():
            group.thaw()
    except (NotFound, FileNotFoundError):
        return
    except OSError as error:
        raise _explain(group, "it can't be thawed", error) from error


def _group(directory: RunDirectory) -> Cgroup:
    launch = directory.launch()
    if launch is None:
        raise NotFound("the container does not run any more")
    return Cgroup(launch.cgroup)


def _explain(group: Cgroup, what: str, error: OSError) -> Failed | NotFound:
    if not group.exists():
        return NotFound("the container does not run any more")
    return Failed(f"{what}: {error.strerror or error}", "`insula explain` shows what is in force")
