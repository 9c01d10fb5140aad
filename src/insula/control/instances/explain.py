"""`insula explain`: the isolation of an instance, as its driver and the fabric read it back from the kernel."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import msgspec

from insula.control.context import Context
from insula.control.disk import disk_view
from insula.control.instances.drivers.base import Running, require
from insula.control.instances.managed import ManagedInstance, ManagedInstances
from insula.control.keys import FLOATING_IPS, LOAD_BALANCERS
from insula.control.networks.backends import backends_of, places_of
from insula.control.networks.floating_views import view_of
from insula.model.errors import InsulaError
from insula.model.objects import Instance
from insula.model.publishing import show
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
        disk=found.disk or disk_view(context.disk, [instance], instance.spec.resources),
        entrances=await _entrances(context, instances, instance),
    )
    if mine := [port.index for port in instance.ports]:
        with suppress(InsulaError):
            installed = await context.fabric_call(instance.tenant, context.fabric.installed, managed.tenant)
            if here := [port for port in installed.ports if port.index in mine]:
                found = msgspec.structs.replace(found, installed=msgspec.to_builtins(here), rules=installed.rules)
    return found


async def _entrances(context: Context, instances: ManagedInstances, instance: Instance) -> list[str]:
    """What leads to the instance from outside, and load balancers that it is a backend of, in words."""
    known = [(each.instance, each.active) for each in instances.of(instance.tenant)]
    floating = {each.name: each for each in await FLOATING_IPS.readable(context.store, instance.tenant)}
    found = [f"published port {show(**msgspec.to_builtins(each))}" for each in instance.spec.published]
    for each in floating.values():
        if target := view_of(each, [instance]).target:
            found.append(f"floating address {each.name}: {each.address} to {target}")
    for balancer in await LOAD_BALANCERS.readable(context.store, instance.tenant):
        if any(backend.id == instance.id and backend.address for backend in backends_of(balancer, known)):
            ports = ", ".join(f"{each.protocol}/{each.port}" for each in balancer.listen)
            places = ", ".join(address or "the host" for address, _ in places_of(balancer, floating))
            found.append(f"load balancer {balancer.name}: {ports} of {places} to port {balancer.port}")
    return found


def _near(instances: ManagedInstances, managed: ManagedInstance) -> dict[str, Running]:
    """Instances that may share a namespace with it: it shares theirs, or they share its."""
    others = [m for m in instances.of(managed.instance.tenant) if m.status.pid and m is not managed]
    joined = {m.instance.spec.options.pid_of for m in (*others, managed)}
    near = [m for m in others if m.instance.spec.options.pid_of or m.instance.name in joined]
    return {m.instance.name: Running(m.status.pid or 0, m.status.start_time or 0) for m in near}
