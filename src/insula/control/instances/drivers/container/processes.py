"""Processes of containers with their PIDs inside and on the host; and `whois`, from a host PID to its instance.

A process has one PID in each PID namespace from its own up to the host's (pid_namespaces(7)). The PID `inside` is the
one in the instance's namespace, the second from the host's. The path of a process's control group, which it can't
leave, names its tenant and instance: ``…/PREFIX/TENANT/ID`` (cgroups(7)).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from insula.kernel import cgroups, process
from insula.model.errors import NotFound
from insula.model.objects import IDS_PER_TENANT
from insula.model.views import ProcessView, WhoIs


def views(found: Sequence[process.Process], id_base: int) -> list[ProcessView]:
    """Views of these processes of an instance, sorted by their PID inside. `id_base` is the tenant's."""
    inside = {p.pid: _inside(p) for p in found}
    return sorted(
        (
            ProcessView(
                pid=p.pid,
                inside=inside[p.pid],
                pids=p.pids,
                parent=inside.get(p.parent, 0),
                uid=p.uid,
                user=p.uid - id_base if 0 <= p.uid - id_base < IDS_PER_TENANT else None,
                state=p.state,
                cpu=process.cpu_time(p.pid),
                command=p.command,
            )
            for p in found
        ),
        key=lambda view: view.inside,
    )


def _inside(found: process.Process) -> int:
    """The PID inside; 0 for a process that is in the control group but not (yet) in the PID namespace."""
    return found.pids[1] if len(found.pids) > 1 else 0


def whois(pid: int, prefix: str) -> WhoIs:
    """The tenant and the instance's id that a host process belongs to. NotFound if there is no such process. Blocks."""
    found, group = process.read(pid), cgroups.of_process(pid) or ""
    if found is None:
        raise NotFound(f"there is no process {pid} on this host", "use a PID of the host, as ps(1) lists them")
    match = re.search(rf"(?:^|/){re.escape(prefix)}/([a-z0-9-]+)/([0-9a-f]{{32}})(?:/|$)", group)
    if not match:
        return WhoIs(pid=pid, command=found.command, pids=found.pids)
    tenant, instance_id = match.groups()
    return WhoIs(
        pid=pid,
        command=found.command,
        tenant=tenant,
        id=instance_id,
        inside=_inside(found) or None,
        pids=found.pids,
    )
