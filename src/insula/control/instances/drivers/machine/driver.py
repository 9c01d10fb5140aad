"""`MachineDriver`: runs instances as virtual machines, each in a container with QEMU.

All that is done to a container from outside is done to this one: signals, streams, exec, logs, limits and records are
those of `ContainerDriver`. What differs is what runs in it, and the nic, which is a tap.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import get_args

from insula.container.service.client import Runtime
from insula.control.instances.drivers.base import CreateOptions, DriverFeature
from insula.control.instances.drivers.container import spec
from insula.control.instances.drivers.container.driver import ContainerDriver
from insula.control.instances.drivers.directory import boot_id
from insula.control.instances.drivers.machine import disk, jail
from insula.control.instances.drivers.machine.request import MachineRequests, disk_size, is_copy, memory
from insula.image.store import ImageStore
from insula.kernel import tap
from insula.kernel.rollback import Rollback
from insula.machine.installation import Installation
from insula.model.objects import Instance, Resources, Tenant
from insula.network.fabric import Nic, TapNic
from insula.settings import Settings
from insula.volume.quota import DiskQuota

_FIRST = 3  # of the descriptors that a container inherits


class MachineDriver(ContainerDriver):
    """The driver of virtual machines. The runtime is that of the containers' driver, which opens and closes it."""

    kind = "machine"
    features: frozenset[DriverFeature] = frozenset(get_args(DriverFeature)) - {"files"}

    def __init__(self, settings: Settings, images: ImageStore, disk: DiskQuota, runtime: Runtime) -> None:
        super().__init__(settings, images, disk)
        self.runtime = runtime
        self.requests: MachineRequests = MachineRequests(settings, images, disk)
        self.installation = Installation(settings.root / "machines", boot_id())

    # -- this host ------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """None: the runtime's trouble is told by the containers' driver."""
        return None

    async def open(self) -> None:
        """Do nothing: what machines share is made when the first one is run."""

    async def close(self) -> None:
        await asyncio.to_thread(self.installation.close)

    async def take_down(self) -> None:
        """Do nothing: containers are removed by their own driver, whatever runs in them."""

    def make_room(self, instances: int) -> None:
        """Do nothing: the terminals of programs are in the guest."""

    def ids(self) -> set[str]:
        """None: they are among those of the containers' driver."""
        return set()

    async def release_layer(self, path: str) -> None:
        """Do nothing: a machine has no layer."""

    # -- the life of an instance ----------------------------------------------------------------------------------

    async def validate(self, tenant: Tenant, draft: Instance) -> None:
        """Also make what machines share, since that takes longer than a start may take."""
        await self.requests.check(tenant, draft)
        await asyncio.to_thread(self._prepare, draft)

    def _prepare(self, instance: Instance) -> Path:
        """Make what is missing of the things that a machine needs, and return the root of the image."""
        self.installation.root()
        if is_copy(instance.spec):
            self.installation.template(memory(instance.spec)).close()
        return self._images.machine_root(instance.image_digest, instance.root.layers)

    async def create(self, tenant: Tenant, instance: Instance, options: CreateOptions) -> None:
        image = await asyncio.to_thread(self._prepare, instance)
        program = await self.requests.launch(tenant, instance, options.networks)
        if size := options.console:
            console = {"height": size.rows, "width": size.columns}
            program.config["process"]["consoleSize"] = console
        with Rollback() as opened:
            given = await asyncio.to_thread(self._open, instance, image, opened)
            if options.connect:
                given["tap"] = opened.hold(await asyncio.to_thread(tap.make))
                await options.connect(TapNic(os.dup(given["tap"])))
            numbers = {name: number for number, name in enumerate(given, _FIRST + 1)}
            plan = opened.hold(self.requests.plan(instance, options.networks, program.config, numbers))
            launch = self.requests.machine(tenant, instance, program, self.installation.root())
            if size:
                launch.config["process"]["consoleSize"] = console
            try:
                await self.runtime.create(launch, [plan, *given.values()])
            finally:
                self.requests.settle(instance)

    def _open(self, instance: Instance, image: Path, opened: Rollback) -> dict[str, int]:
        """Open what QEMU is given: the disks, and the template. Blocks."""
        path = self.requests.disk(instance.id)
        disk.ensure(path, disk_size(instance.spec))
        found = {
            "image": opened.hold(os.open(image, os.O_RDONLY | os.O_CLOEXEC)),
            "disk": opened.hold(os.open(path, os.O_RDWR | os.O_CLOEXEC)),
        }
        if is_copy(instance.spec):
            template = self.installation.template(memory(instance.spec))
            found |= {"memory": opened.hold(template.memory), "state": opened.hold(template.state)}
        return found

    def nic(self, instance_id: str) -> Nic:
        """The tap of a machine that runs, which is QEMU's."""
        return TapNic(None)

    async def resize(self, instance_id: str, resources: Resources) -> None:
        """Apply other limits to the container; the guest has its memory from its next start on."""
        await self.runtime.update(instance_id, spec.update(jail.resources(resources)))

    def writable(self, instance_id: str) -> Path | None:
        """None: a disk can't grow beyond its size."""
        return None
