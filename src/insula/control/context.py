"""The parts of the daemon that everything in this room works with, put together once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from insula.control.allocation.reservations import Allocators
from insula.control.instances.drivers.base import Driver
from insula.control.instances.drivers.groups import TenantGroups
from insula.control.problems import Problems
from insula.control.workers import Locks, Workers
from insula.model.errors import Unavailable
from insula.model.objects import Instance, InstanceSpec
from insula.settings import Settings
from insula.store.protocol import Store

if TYPE_CHECKING:
    from insula.image.store import ImageStore
    from insula.network.fabric import Fabric

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """The parts. A fabric serves one thread a tenant: `fabric_call` keeps to that, while tenants don't wait for each
    other. `preparing` has the tenants whose part of this host was not looked
    at yet since the daemon started; what needs it waits in `prepared`. `going_down` is set once everything is taken off
    this host: from then on nothing is made. `surveys` read what /proc and the control groups say of an instance.
    `unreadable` are keys of damaged records in the store: while there are any, nothing is anybody's leftover."""

    settings: Settings
    host: str
    store: Store
    allocators: Allocators
    drivers: Mapping[str, Driver]
    groups: TenantGroups
    fabric: Fabric
    images: ImageStore
    locks: Locks = field(default_factory=Locks)
    problems: Problems = field(default_factory=Problems)
    preparing: dict[str, asyncio.Event] = field(default_factory=dict)
    going_down: asyncio.Event = field(default_factory=asyncio.Event)
    surveys: Workers = field(default_factory=lambda: Workers(2))
    unreadable: set[str] = field(default_factory=set)

    def driver(self, instance: Instance) -> Driver:
        """The driver of the instance's kind."""
        return self.driver_for(instance.spec)

    def driver_for(self, spec: InstanceSpec) -> Driver:
        """The driver of the kind that is asked for."""
        return self.drivers[spec.kind]

    async def release_layer(self, path: Path) -> None:
        """Have every driver drop what it holds of an image's layer that is about to be removed."""
        for driver in self.drivers.values():
            await driver.release_layer(str(path))

    def check_stays(self) -> None:
        """Raise Unavailable if everything is being taken off this host."""
        if self.going_down.is_set():
            raise going_down()

    async def prepared(self, tenant: str) -> None:
        """Returns once the tenant's networks and control group are as they should be, or can't be made so."""
        if event := self.preparing.get(tenant):
            await event.wait()

    async def fabric_call(self, tenant: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`call`, a blocking method of the fabric about `tenant`, in a worker thread.

        It runs to its end even if the caller is cancelled: half a change of a network is worse than a whole one.
        """

        async def serialised() -> T:
            await self.prepared(tenant)
            async with self.locks[tenant]:
                return await asyncio.to_thread(call, *args, **kwargs)

        return await asyncio.shield(asyncio.ensure_future(serialised()))


def going_down() -> Unavailable:
    """Why nothing can be made while everything is being taken off this host."""
    return Unavailable("insulad is shutting down", "start it again, and try again")
