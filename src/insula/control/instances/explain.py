"""What makes an instance isolated: its driver's account of it, and the fabric's read-back of its port."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import msgspec

from insula.control.instances.drivers.base import Running
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.supervisor import Supervisor
from insula.model.errors import InsulaError
from insula.model.views import Explanation


async def explain(supervisor: Supervisor, member: ManagedInstance) -> Explanation:
    """Everything that is known; what needs a running process is empty when it doesn't run."""
    context, instance, status = supervisor.context, member.instance, member.status
    if not member.active:
        status = msgspec.structs.replace(status, pid=None)
    driver, near = context.driver(instance), _near(supervisor, member)
    work = partial(driver.explain, member.tenant, instance, status, near)
    found = await context.surveys.do(instance.tenant, work)
    found = msgspec.structs.replace(
        found, status=member.status, health=member.monitor.health if member.monitor else None
    )
    if port := instance.port:
        with suppress(InsulaError):
            installed = await context.fabric_call(instance.tenant, context.fabric.installed, member.tenant)
            here = next((p for p in installed.ports if p.index == port.index), None)
            if here:
                found = msgspec.structs.replace(
                    found, device=here.device, installed=msgspec.to_builtins(here), rules=installed.rules
                )
    return found


def _near(supervisor: Supervisor, member: ManagedInstance) -> dict[str, Running]:
    """The instances that may share a namespace with it: those that join another's, and the joined."""
    others = [m for m in supervisor.of(member.instance.tenant) if m.status.pid and m is not member]
    joined = {m.instance.spec.options.pid_of for m in (*others, member)}
    near = [m for m in others if m.instance.spec.options.pid_of or m.instance.name in joined]
    return {m.instance.name: Running(m.status.pid or 0, m.status.start_time or 0) for m in near}
