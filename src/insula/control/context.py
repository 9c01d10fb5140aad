"""`Context`: the parts of the daemon that all modules of control/ share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from insula.control.allocation.in_flight import InFlight
from insula.control.allocation.limits import TenantLimits
from insula.control.allocation.rates import Rates
from insula.control.allocation.reservations import Allocators
from insula.control.instances.drivers.base import DISK_MACHINES, Driver
from insula.control.instances.drivers.groups import TenantGroups
from insula.control.problems import Problems
from insula.control.telemetry import Telemetry
from insula.control.workers import Locks, Workers
from insula.model.disk_images import DiskRoot
from insula.model.errors import Unavailable
from insula.model.objects import Instance, InstanceSpec
from insula.model.quota_settings import user_limit
from insula.settings import Settings
from insula.store.protocol import Store

if TYPE_CHECKING:
    from insula.image.store import ImageStore
    from insula.network.fabric import Fabric
    from insula.volume.quota import DiskQuota

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """The parts that all modules of control/ share.

    A fabric allows one thread for each tenant; `fabric_call` keeps to that (`locks`). `preparing` has the tenants
    that were not reconciled yet since the daemon started; `prepared` waits for one. `going_down` is set when everything
    is being removed from this host; from then on nothing is made. `surveys` are the threads that read /proc and control
    groups. `unreadable` has the keys of damaged records in the store; while there are any, nothing on the host is taken
    for a leftover. `telemetry` counts what the daemon does. `limits` are those of all tenants, `in_flight` is what open
    requests hold of them.
    """

    settings: Settings
    host: str
    store: Store
    allocators: Allocators
    drivers: Mapping[str, Driver]
    groups: TenantGroups
    fabric: Fabric
    images: ImageStore
    disk: DiskQuota
    locks: Locks = field(default_factory=Locks)
    problems: Problems = field(default_factory=Problems)
    preparing: dict[str, asyncio.Event] = field(default_factory=dict)
    going_down: asyncio.Event = field(default_factory=asyncio.Event)
    surveys: Workers = field(default_factory=lambda: Workers(2))
    unreadable: set[str] = field(default_factory=set)
    telemetry: Telemetry = field(default_factory=Telemetry)
    limits: TenantLimits = field(init=False)
    in_flight: InFlight = field(init=False)
    rates: Rates = field(init=False)

    def __post_init__(self) -> None:
        limits = TenantLimits(self.store, self.problems)
        object.__setattr__(self, "limits", limits)
        object.__setattr__(self, "in_flight", InFlight(limits.of, user_limit(self.settings.quotas, "user_streams")))
        object.__setattr__(self, "rates", Rates(user_limit(self.settings.quotas, "user_requests")))

    def driver(self, instance: Instance) -> Driver:
        """The driver of the instance's kind, and of what it is made of."""
        return self.drivers[DISK_MACHINES] if isinstance(instance.root, DiskRoot) else self.driver_for(instance.spec)

    def driver_for(self, spec: InstanceSpec) -> Driver:
        """The driver of the spec's kind."""
        return self.drivers[spec.kind]

    async def release_layer(self, path: Path) -> None:
        """Have every driver release an image's layer that is about to be removed."""
        for driver in self.drivers.values():
            await driver.release_layer(str(path))

    def refuse_if_going_down(self) -> None:
        """Raise Unavailable if everything is being removed from this host."""
        if self.going_down.is_set():
            raise going_down()

    async def prepared(self, tenant: str) -> None:
        """Wait until the tenant was reconciled once since the daemon started, with or without success."""
        if event := self.preparing.get(tenant):
            await event.wait()

    async def fabric_call(self, tenant: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call`, a blocking method of the fabric about `tenant`, in a worker thread. Return what it returns.

        It runs to its end even if the caller is cancelled, since a half-made change of a network needs repair.
        """
        return await asyncio.shield(asyncio.ensure_future(self.fabric_turn(tenant, call, *args, **kwargs)))

    async def fabric_turn(self, tenant: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`fabric_call` for a call that only reads, or a caller that must not be cancelled. Its thread starts at once
        if no other has its turn."""
        async with self.turn(tenant):
            return await asyncio.to_thread(call, *args, **kwargs)

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Take the tenant's turn at the fabric."""
        await self.prepared(tenant)
        async with self.locks[tenant]:
            yield

    @asynccontextmanager
    async def turn_within(self, tenant: str, seconds: float) -> AsyncIterator[bool]:
        """Take the tenant's turn at the fabric if it comes within `seconds`. Yield whether it has."""
        async with AsyncExitStack() as held:
            got = False
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await held.enter_async_context(self.turn(tenant))
                    got = True
            yield got


def going_down() -> Unavailable:
    """The error of requests while everything is being removed from this host."""
    return Unavailable("insulad is shutting down", "start it again, and try again")
