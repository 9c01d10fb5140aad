"""Change the limits of a running container, freeze it, and thaw it, by its control group (cgroups(7)).

Limits are files that can be written at any time. Freezing stops every process of the group without a signal: unlike
SIGSTOP, which a parent or a shell would notice, and which a process inside could undo. Version 2 has a file for it
(cgroup.freeze). Version 1 has a controller (freezer-subsystem.rst), whose frozen processes don't die of SIGKILL before
they are thawed.
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
    """Freeze all processes of the container. `Failed` if some can't be frozen: then none is. `NotFound` if it is
    gone."""
    group = _group(directory)
    try:
        group.freeze()
    except OSError as error:
        raise _explain(group, "it can't be frozen", error) from error


def resume(directory: RunDirectory) -> None:
    """Thaw the processes of the container; nothing happens if they are not frozen, or gone."""
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
