"""Instances in the PID namespace of another, `--pid container:NAME`: who is with whom.

A PID namespace lives and dies with its first process (pid_namespaces(7)). So the other instance must run when this one
starts; and when it ends, the kernel kills all that is in its namespace, and this one's end is an exit by SIGKILL. A
PID namespace also belongs to one user namespace, whose root may signal and trace what is in it: both are shared. So
both instances are of one tenant, whose IDs they have in common anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from insula.control.specs import typed
from insula.model.errors import Conflict, NotFound

if TYPE_CHECKING:
    from insula.control.supervisor import Member, Supervisor


def partner(supervisor: Supervisor, member: Member) -> tuple[int, int] | None:
    """The other's first process as PID and start time, None for an instance that shares nothing.

    NotFound and Conflict unless the other runs.
    """
    tenant, name, other_name = member.instance.tenant, member.instance.name, member.instance.spec.pid_of
    if other_name is None:
        return None
    other = supervisor.find(tenant, other_name)
    if other is None or other is member:
        listing = typed(tenant, "ps -a")
        raise NotFound(f"there is no other instance {other_name}, whose processes {name} would share", f"see {listing}")
    status = other.status
    if status.state != "running" or status.pid is None or status.start_time is None:
        start = typed(tenant, f"start {other_name}")
        raise Conflict(
            f"instance {other_name}, whose processes {name} shares, is not running ({status.state})", f"first {start}"
        )
    return status.pid, status.start_time


def guests(supervisor: Supervisor, member: Member) -> Iterator[Member]:
    """Those who share this one's processes, and end with it."""
    name, tenant = member.instance.name, member.instance.tenant
    for other in list(supervisor.members.values()):  # in no order: this is asked at every end
        if other.instance.spec.pid_of == name and other.instance.tenant == tenant and other.active:
            yield other
            yield from guests(supervisor, other)
