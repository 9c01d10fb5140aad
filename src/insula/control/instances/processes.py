"""Processes with all their numbers: inside ↔ host; and the way back, from a host PID to its instance.

A process has one PID in each PID namespace from its own up to the host's (pid_namespaces(7)). The number `inside` is
the one in the instance's namespace, the second from the host's. Whose a process is tells its control group, which it
can't leave: ``…/PREFIX/TENANT/ID`` (cgroups(7)).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from insula.container.runtime import Runtime
from insula.control.instances.supervisor import Member, Supervisor
from insula.kernel import cgroups, process
from insula.model.errors import Invalid, NotFound
from insula.model.objects import IDS_PER_TENANT
from insula.model.views import ProcessView, WhoIs


def views(runtime: Runtime, member: Member) -> Sequence[ProcessView]:
    """Everything in the instance's control group, by the number inside."""
    found = runtime.processes(member.instance.id)
    inside = {p.pid: _inside(p) for p in found}
    base = member.tenant.id_base
    return sorted(
        (
            ProcessView(
                pid=p.pid,
                inside=inside[p.pid],
                pids=p.pids,
                parent=inside.get(p.parent, 0),
                uid=p.uid,
                user=p.uid - base if 0 <= p.uid - base < IDS_PER_TENANT else None,
                state=p.state,
                cpu=process.cpu_time(p.pid),
                command=p.command,
            )
            for p in found
        ),
        key=lambda view: view.inside,
    )


def _inside(found: process.Process) -> int:
    """0 for a process that is in the group but not (yet) in the PID namespace."""
    return found.pids[1] if len(found.pids) > 1 else 0


async def whois(supervisor: Supervisor, pid: int) -> WhoIs:
    """To whom a host process belongs. NotFound if there is no such process."""
    if not 0 < pid < 1 << 31:
        raise Invalid(f"{pid} is no process ID", "use one of the host's, as ps(1) lists them")
    found, group = await asyncio.to_thread(lambda: (process.read(pid), cgroups.of_process(pid) or ""))
    if found is None:
        raise NotFound(f"there is no process {pid} on this host", "use a number of the host's, as ps(1) lists them")
    prefix = re.escape(supervisor.context.settings.prefix)
    match = re.search(rf"(?:^|/){prefix}/([a-z0-9-]+)/([0-9a-f]{{32}})(?:/|$)", group)
    if not match:
        return WhoIs(pid=pid, command=found.command, pids=found.pids)
    tenant, instance_id = match.groups()
    name = next((m.instance.name for m in supervisor.of(tenant) if m.instance.id == instance_id), None)
    return WhoIs(
        pid=pid,
        command=found.command,
        tenant=tenant,
        instance=name,
        id=instance_id,
        inside=_inside(found) or None,
        pids=found.pids,
    )
