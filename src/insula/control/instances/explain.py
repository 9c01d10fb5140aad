"""`insula explain`: the isolation of an instance, as its driver and the fabric read it back from the kernel."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import msgspec

from insula.control.context import Context
from insula.control.disk import disk_view
from insula.control.instances.drivers.base import Running, require
from insula.control.instances.managed import ManagedInstance, ManagedInstances
from insula.model.errors import InsulaError
from insula.model.views import Explanation


async def explain(context: Context, instances: ManagedInstances, managed: ManagedInstance) -> Explanation:
    """The explanation of an instance. Fields that need a running process are empty if it doesn't run. Unavailable."""
    instance, status = managed.instance, managed.status
    if not managed.active:
        status = msgspec.structs.replace(status, pid=None)
    driver, near = require(context.driver(instance), "explain"), _near(instances, managed)
    work = partial(driver.explain, managed.tenant, instance, status, near)
    found = await context.surveys.do(instance.tenant, work)
    found = msgspec.structs.replace(
        found,
        status=managed.status,
        health=managed.monitor.health if managed.monitor else None,
        disk=disk_view(context.disk, [instance], instance.spec.resources),
    )
    if mine := [port.index for port in instance.ports]:
        with suppress(InsulaError):
            installed = await context.fabric_call(instance.tenant, context.fabric.installed, managed.tenant)
            if here := [port for port in installed.ports if port.index in mine]:
                found = msgspec.structs.replace(found, installed=msgspec.to_builtins(here), rules=installed.rules)
    return found


def _near(instances: ManagedInstances, managed: ManagedInstance) -> dict[str, Running]:
    """Instances that may share a namespace with it: it shares theirs, or they share its."""
    others = [m for m in instances.of(managed.instance.tenant) if m.status.pid and m is not managed]
    joined = {m.instance.spec.options.pid_of for m in (*others, managed)}
    near = [m for m in others if m.instance.spec.options.pid_of or m.instance.name in joined]
    return {m.instance.name: Running(m.status.pid or 0, m.status.start_time or 0) for m in near}
