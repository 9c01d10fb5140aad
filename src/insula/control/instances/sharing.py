"""Instances that share another's PID namespace: `--pid container:NAME`.

A PID namespace ends with its first process (pid_namespaces(7)). So the other instance must run when this one starts.
When the other ends, the kernel kills all processes in its namespace, so this one exits by SIGKILL. A PID namespace
belongs to one user namespace, whose root may signal and trace the processes in it; so both namespaces are shared, and
both instances must be of one tenant.
"""

from __future__ import annotations

from collections.abc import Iterator

from insula.control.instances.drivers.base import Running
from insula.control.instances.managed import ManagedInstance, ManagedInstances
from insula.control.instances.specs import cli_command
from insula.model.errors import Conflict, NotFound
from insula.model.objects import InstanceSpec


def pid_owner(managed: ManagedInstances, tenant: str, spec: InstanceSpec) -> Running | None:
    """The first process of the instance whose PID namespace is shared; None if the spec shares none. NotFound, Conflict
    unless that instance runs."""
    owner = spec.options.pid_of
    if owner is None:
        return None
    name, other = spec.name or "this one", managed.find(tenant, owner)
    if other is None or owner == spec.name:
        what = f"there is no other instance {owner}, whose processes {name} would share"
        raise NotFound(what, f"see {cli_command(tenant, 'ps -a')}")
    status = other.status
    if status.state != "running" or status.pid is None or status.start_time is None:
        start = cli_command(tenant, f"start {owner}")
        raise Conflict(
            f"instance {owner}, whose processes {name} shares, is not running ({status.state})", f"first {start}"
        )
    return Running(status.pid, status.start_time)


def pid_members(managed: ManagedInstances, member: ManagedInstance) -> Iterator[ManagedInstance]:
    """The active instances in this one's PID namespace, directly or through another. They end with it."""
    name, tenant = member.instance.name, member.instance.tenant
    for other in managed.sharing():
        if other.instance.spec.options.pid_of == name and other.instance.tenant == tenant and other.active:
            yield other
            yield from pid_members(managed, other)
