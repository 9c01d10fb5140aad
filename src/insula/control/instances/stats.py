"""`insula stats`: resource usage of instances, measured only while a client asks for it.

The counters are the kernel's: of the control group, and of the rules at the port. CPU usage takes two readings of
a counter; so a series begins with one that is not shown, and a single sample takes `FIRST` seconds. Files are read in
a worker thread, and only for the instances that were asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import msgspec

from insula.control.context import Context
from insula.control.disk import disk_usage
from insula.control.instances.checks import no_instance
from insula.control.instances.drivers.base import Driver, require
from insula.control.instances.managed import ManagedInstance, ManagedInstances
from insula.control.keys import TENANTS
from insula.control.tenants import Tenants
from insula.model.errors import InsulaError
from insula.model.objects import Instance, Limits, Port
from insula.model.views import InstanceStats, StatsSample
from insula.network.fabric import Traffic
from insula.volume.quota import DiskUsage

FIRST: Final = 0.5
"""Seconds before the first sample."""

Counters = dict[str, dict[str, Any]]
"""The results of `Driver.stats`, by the instance's id."""
PortTraffic = dict[int, Traffic]
"""The results of `Fabric.traffic`, by the port's index, which is unique among all tenants."""


class Stats:
    """Measures instances. `find` is `Instances.find`, which raises NotFound."""

    def __init__(
        self,
        context: Context,
        managed: ManagedInstances,
        tenants: Tenants,
        find: Callable[[str, str], Awaitable[ManagedInstance]],
    ) -> None:
        self.context = context
        self.managed = managed
        self.tenants = tenants
        self.find = find

    async def of(
        self,
        tenant: str | None,
        names: Sequence[str] = (),
        *,
        interval: float | None = None,
        among: Collection[str] | None = None,
        labels: Mapping[str, str] = MappingProxyType({}),
    ) -> AsyncIterator[StatsSample]:
        """One sample, or one every `interval` seconds, of the instances `names`, or of all that run at that time.
        `tenant` None is all tenants, or those `among` the given ones. With `labels` only instances that have them all
        are there. NotFound; a series ends when the last of `names` is removed."""

        def fits(managed: ManagedInstance) -> bool:
            return labels.items() <= managed.instance.spec.labels.items()

        if tenant is not None:
            await self.tenants.find(tenant)
            names = [*dict.fromkeys(names)]
            for name in names:
                if not fits(managed := await self.find(tenant, name)):
                    raise no_instance(tenant, name)
                require(self.context.driver(managed.instance), "stats")

        wanted = frozenset(names)

        def present() -> list[ManagedInstance]:
            tenants = [tenant] if among is None else among
            all_of = (managed for each in tenants for managed in self.managed.of(each) if fits(managed))
            return [m for m in all_of if (m.instance.name in wanted if wanted else m.active)]

        async for sample in self._samples(tenant or "", present, interval):
            yield sample
            if names and not sample.instances:
                return

    async def _samples(
        self, asking: str, manageds: Callable[[], Sequence[ManagedInstance]], interval: float | None
    ) -> AsyncIterator[StatsSample]:
        before, then = await self._counters(asking, manageds()), time.monotonic()
        await asyncio.sleep(FIRST)
        while True:
            present = manageds()
            counters, now = await self._counters(asking, present), time.monotonic()
            traffic, limits = await self._traffic(present), await self._limits(present)
            usage = [
                _stats(
                    managed,
                    counters,
                    _used(managed, before, counters, now - then),
                    traffic,
                    limits,
                    disk_usage(self.context.disk, managed.instance),
                )
                for managed in present
            ]
            yield StatsSample(time=time.time(), instances=usage)
            if interval is None:
                return
            before, then = counters, now
            await asyncio.sleep(interval)

    async def _counters(self, asking: str, manageds: Iterable[ManagedInstance]) -> Counters:
        by_driver: dict[Driver, list[Instance]] = defaultdict(list)
        for managed in manageds:
            if managed.active and "stats" in (driver := self.context.driver(managed.instance)).features:
                by_driver[driver].append(managed.instance)
        found: Counters = {}
        for driver, instances in by_driver.items():
            found.update(await self.context.surveys.do(asking, partial(driver.stats, instances)))
        return found

    async def _traffic(self, manageds: Iterable[ManagedInstance]) -> PortTraffic:
        ports: dict[str, list[Port]] = defaultdict(list)
        owners = {}
        for managed in manageds:
            if managed.active and managed.instance.ports:
                ports[managed.instance.tenant] += managed.instance.ports
                owners[managed.instance.tenant] = managed.tenant
        context, found = self.context, {}
        for name, owner in owners.items():
            with suppress(InsulaError, OSError):  # the tenant's network is missing: its controller repairs it
                found.update(await context.fabric_call(name, context.fabric.traffic, owner, ports[name]))
        return found

    async def _limits(self, manageds: Iterable[ManagedInstance]) -> dict[str, Limits]:
        names = {managed.instance.tenant for managed in manageds}
        found = [await TENANTS.get(self.context.store, name) for name in names]
        return {each.value.name: each.value.limits for each in found if each}


def _used(managed: ManagedInstance, before: Counters, now: Counters, seconds: float) -> float | None:
    """CPUs in use between two readings; from the second alone if the instance was started again in between."""
    old: int | None = before.get(managed.instance.id, {}).get("cpu", {}).get("usage")
    new: int | None = now.get(managed.instance.id, {}).get("cpu", {}).get("usage")
    if new is None or old is None or seconds <= 0:
        return None
    return round((new - old if new >= old else new) / seconds / 1e9, 4)


def _bytes(io: dict[str, dict[str, int]] | None, name: str) -> int | None:
    """Bytes of all devices; None if nothing is counted, as by cgroup version 1 until I/O is limited."""
    return None if io is None else sum(device.get(name, 0) for device in io.values())


def _stats(
    managed: ManagedInstance,
    counters: Counters,
    cpu: float | None,
    traffic: PortTraffic,
    limits: dict[str, Limits],
    disk: DiskUsage | None,
) -> InstanceStats:
    instance, found = managed.instance, counters.get(managed.instance.id)
    whole, own = limits.get(instance.tenant, Limits()), instance.spec.resources
    shown = InstanceStats(
        tenant=instance.tenant,
        name=instance.name,
        state=managed.status.state,
        cpu_limit=own.cpus if own.cpus is not None else whole.cpus,
        memory_limit=own.memory if own.memory is not None else whole.memory,
        pids_limit=own.pids if own.pids is not None else whole.pids,
        disk=disk.space if disk else None,
        disk_limit=own.disk,
    )
    if found is None:
        return shown
    moved = [each for port in instance.ports if (each := traffic.get(port.index))]
    io = found.get("io")
    return msgspec.structs.replace(
        shown,
        cpu=cpu,
        cpu_time=found.get("cpu", {}).get("usage"),
        throttled=found.get("cpu", {}).get("throttled"),
        memory=found.get("memory", {}).get("working_set"),
        pids=found.get("pids", {}).get("current"),
        received=sum(each.received.bytes for each in moved) if moved else None,
        sent=sum(each.sent.bytes for each in moved) if moved else None,
        read=_bytes(io, "read_bytes"),
        written=_bytes(io, "write_bytes"),
        pressure={
            what: {kind: numbers["avg10"] for kind, numbers in kinds.items()}
            for what, kinds in found.get("pressure", {}).items()
        },
    )
