"""`XenDriver`: runs instances of container images as guests of Xen, on the host that is its domain 0.

The container, in which only the shim runs, is to the instance what it is with QEMU: its streams, log, signals, `exec`
and exit record are those of the shim. The guest is Xen's, and goes on whatever happens to insulad. It is there before
its container is made, and removed before that is: so a guest without a container is one that a crash has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path

from insula.container.service.client import Runtime
from insula.control.instances.drivers.base import CreateOptions, DriverFeature, Running
from insula.control.instances.drivers.container.driver import ContainerDriver
from insula.control.instances.drivers.container.spec import console_size
from insula.control.instances.drivers.directory import boot_id
from insula.control.instances.drivers.machine import disk
from insula.control.instances.drivers.machine.driver import MachineDriver
from insula.control.instances.drivers.machine.sizes import disk_size, size
from insula.control.instances.drivers.xen.checks import BOUNDARY
from insula.control.instances.drivers.xen.guests import Guests
from insula.control.instances.drivers.xen.keepers import Keepers
from insula.control.instances.drivers.xen.request import XenRequests
from insula.control.tasks import together
from insula.image.store import ImageStore
from insula.kernel.rollback import Rollback
from insula.machine.hypervisor import DiskConfig
from insula.machine.kept import KeptInstallation
from insula.machine.registry import open_hypervisor
from insula.model.disks import FurtherDisk
from insula.model.errors import Conflict, InsulaError, NotFound, Unavailable
from insula.model.objects import Instance, InstanceStatus, Network, Tenant
from insula.model.views import Explanation
from insula.network.fabric import DeviceNic, Nic
from insula.settings import Settings
from insula.volume.quota import DiskQuota

log = logging.getLogger("insula.control")
_CHANNEL = 4  # the number of the first descriptor behind the plan
_SWEEP = 60.0  # seconds between looks for guests that a crash has left


class XenDriver(MachineDriver):
    """The driver of virtual machines where the hypervisor of the settings is Xen."""

    features: frozenset[DriverFeature] = frozenset(
        ("exec", "attach", "pause", "files", "stats", "processes", "explain", "memory-events", "answers")
    )

    def __init__(self, settings: Settings, images: ImageStore, disk: DiskQuota, runtime: Runtime) -> None:
        super().__init__(settings, images, disk, runtime)
        self.requests: XenRequests = XenRequests(settings, images, disk)
        self.kept = KeptInstallation(settings.root / "machines", boot_id(), {})
        self._keepers = Keepers(lambda: open_hypervisor(settings.machines.hypervisor))
        self.guests = Guests(self._keepers, settings.prefix)

    def check_disks(self, instance: Instance, disks: Sequence[FurtherDisk], *, active: bool) -> None:
        raise Conflict(f"{instance.name} is a guest of Xen, which has no further disks", "make its own one larger")

    # -- this host ------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Remove guests that a crash has left, in the background."""
        self._spawn(self._keep_clean())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._keepers.close)

    async def take_down(self) -> None:
        """Remove all guests. Their containers are removed by their own driver."""
        for each in await self.guests.all():
            await self.guests.remove(each)

    async def _keep_clean(self) -> None:
        told = ""
        while True:
            try:
                for each in await self.guests.all():
                    await self._repair(each)
                told = ""
            except (InsulaError, OSError) as error:
                if str(error) != told:
                    log.warning("guests that a crash may have left can't be looked for: %s", error)
                told = str(error)
            await asyncio.sleep(_SWEEP)

    async def _repair(self, instance_id: str) -> None:
        """Remove a guest that has no container, and stop one whose container is stopped."""
        async with self.guests.locks[instance_id]:
            if self.runtime.state(instance_id) is None:
                await self.guests.remove(instance_id)
            elif await asyncio.to_thread(self._is_frozen, instance_id):
                await self.guests.pause(instance_id)

    # -- the life of an instance ----------------------------------------------------------------------------------

    async def validate(self, tenant: Tenant, draft: Instance) -> None:
        """Also make what guests share, since that takes longer than a start may take."""
        await self.requests.check(tenant, draft)
        await asyncio.to_thread(self._prepare, tenant, draft)

    def _prepare(self, tenant: Tenant, instance: Instance) -> Path:
        """Make what is missing of the things that a guest needs, and return the root of the image."""
        self.kept.root()
        return self._images.machine_root(instance.image_digest, instance.root.layers)

    async def create(self, tenant: Tenant, instance: Instance, options: CreateOptions) -> None:
        self.readiness.forget(instance.id)
        image = await asyncio.to_thread(self._prepare, tenant, instance)
        program = await self.requests.launch(tenant, instance, options.networks)
        window = console_size(options.console)
        program.config["process"] |= window
        path = self.requests.disk(instance.id)
        await asyncio.to_thread(disk.ensure, path, disk_size(instance.spec), self.kept.blank)
        ports = instance.plugged if options.connect else []
        config = self.guests.config(
            instance.id,
            size(instance.spec),
            self.kept.files(),
            [DiskConfig(str(image), read_only=True), DiskConfig(str(path))],
            [port.mac for port in ports],
        )
        async with self.guests.locks[instance.id]:
            with Rollback() as opened:
                guest = await self.guests.start(config)
                opened.hold(guest.console)
                generation = self.readiness.give(instance.id)
                plan = self.requests.served(instance, options.networks, program.config, _CHANNEL, generation)
                opened.hold(plan)
                launch = self.requests.of_shim(tenant, program, self.kept.root())
                launch.config["process"] |= window
                work: list[Awaitable[object]] = [self.runtime.create(launch, [plan, guest.console])]
                if options.connect:
                    work += [options.connect(DeviceNic(guest.devices[port.mac]), port.index) for port in ports]
                try:
                    await together(*work)
                finally:
                    self.requests.settle(instance)

    async def pause(self, instance_id: str) -> None:
        """Stop the shim, and then the guest."""
        async with self.guests.locks[instance_id]:
            await super().pause(instance_id)
            try:
                await self.guests.pause(instance_id)
            except NotFound:  # it has just ended
                return
            except BaseException:
                await ContainerDriver.resume(self, instance_id)
                raise

    async def resume(self, instance_id: str) -> None:
        """Have the guest go on, and then the shim, which gives it another identity."""
        async with self.guests.locks[instance_id]:
            if await asyncio.to_thread(self._is_frozen, instance_id):
                with contextlib.suppress(NotFound):  # it has ended, and the shim will
                    await self.guests.resume(instance_id)
            await super().resume(instance_id)

    @contextlib.asynccontextmanager
    async def holder(self, tenant: Tenant, instance: Instance, networks: Sequence[Network]) -> AsyncIterator[Running]:
        """Unavailable: the files of a guest are reached through its kernel alone."""
        what = f"the files of {instance.name}, a virtual machine of Xen, can be copied only while it runs"
        raise Unavailable(what, "start it before")
        yield

    async def discard(self, instance: Instance) -> None:
        """Turn the guest off, and then remove its container: so this is done again if it can't be turned off now."""
        async with self.guests.locks[instance.id]:
            await self.guests.remove(instance.id)
            await super().discard(instance)

    def nic(self, instance_id: str) -> Nic:
        """The device of a guest that runs, which was plugged in before."""
        return DeviceNic(None)

    async def resize(self, instance: Instance) -> Sequence[str]:
        """Do nothing: a guest has what it was started with until its next start."""
        return ("it has what it was started with until its next start",)

    def explain(
        self, tenant: Tenant, instance: Instance, status: InstanceStatus, near: Mapping[str, Running]
    ) -> Explanation:
        found = ContainerDriver.explain(self, tenant, instance, status, near)
        if found.security:
            found.security["processors"] = BOUNDARY
        return found
