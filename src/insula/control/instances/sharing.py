"""Instances in the PID namespace of another, `--pid container:NAME`: who is with whom.

A PID namespace lives and dies with its first process (pid_namespaces(7)). So the other instance must run when this one
starts; and when it ends, the kernel kills all that is in its namespace, and this one's end is an exit by SIGKILL. A
PID namespace also belongs to one user namespace, whose root may signal and trace what is in it: both are shared. So
both instances are of one tenant, whose IDs they have in common anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

from insula.control.instances.drivers.base import Running
from insula.control.instances.managed import ManagedInstance, ManagedInstances
from insula.control.instances.specs import typed
from insula.model.errors import Conflict, NotFound
from insula.model.objects import InstanceSpec


def partner(managed: ManagedInstances, tenant: str, spec: InstanceSpec) -> Running | None:
    """The other's first process, None for an instance that shares nothing.

    NotFound and Conflict unless the other runs.
    """
    owner = spec.options.pid_of
    if owner is None:
        return None
    name, other = spec.name or "this one", managed.find(tenant, owner)
    if other is None or owner == spec.name:
        what = f"there is no other instance {owner}, whose processes {name} would share"
        raise NotFound(what, f"see {typed(tenant, 'ps -a')}")
    status = other.status
    if status.state != "running" or status.pid is None or status.start_time is None:
        start = typed(tenant, f"start {owner}")
        raise Conflict(
            f"instance {owner}, whose processes {name} shares, is not running ({status.state})", f"first {start}"
        )
    return Running(status.pid, status.start_time)


def guests(managed: ManagedInstances, member: ManagedInstance) -> Iterator[ManagedInstance]:
    """Those who share this one's processes, and end with it."""
    name, tenant = member.instance.name, member.instance.tenant
    for other in managed.all():  # in no order: this is asked at every end
        if other.instance.spec.options.pid_of == name and other.instance.tenant == tenant and other.active:
            yield other
            yield from guests(managed, other)
