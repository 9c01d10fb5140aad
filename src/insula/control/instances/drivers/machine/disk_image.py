"""`DiskImageDriver`: runs instances of disk images, virtual machines of any operating system, without our agent.

Each has a copy of the image's disk, which keeps the blocks that it does not write in common with it where the file
system of the host can do that. Its serial port is its standard input and output.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Literal, get_args

from insula.container.service.client import Runtime
from insula.control.instances.drivers.base import DISK_MACHINES, Archive, DriverFeature, Running
from insula.control.instances.drivers.machine import screen
from insula.control.instances.drivers.machine.disk_image_files import DiskImageFiles
from insula.control.instances.drivers.machine.disk_image_request import (
    DiskImageRequests,
    check_further,
    devices,
    disk_of,
    disk_size,
    no_agent,
)
from insula.control.instances.drivers.machine.disk_image_snapshots import DiskImageSnapshots
from insula.control.instances.drivers.machine.driver import MachineDriver
from insula.control.instances.drivers.machine.guest_report import ask_guest
from insula.control.instances.drivers.machine.plugging import asked
from insula.control.workers import in_thread
from insula.image.store import ImageStore
from insula.kernel.rollback import Rollback
from insula.machine.installation import Installation
from insula.model.disks import FurtherDisk
from insula.model.errors import Conflict, Failed
from insula.model.guests import GuestReport
from insula.model.objects import Instance, Network, Tenant
from insula.model.views import ExecSpec
from insula.settings import Settings
from insula.volume.quota import DiskQuota

_copiers = ThreadPoolExecutor(2, "insula-disk")


class DiskImageDriver(MachineDriver):
    """The driver of disk images. What machines share is that of the other machines' driver."""

    kind = DISK_MACHINES
    features: frozenset[DriverFeature] = frozenset(get_args(DriverFeature)) - {"migrate"}

    def __init__(
        self, settings: Settings, images: ImageStore, disk: DiskQuota, runtime: Runtime, installation: Installation
    ) -> None:
        super().__init__(settings, images, disk, runtime)
        self.requests = DiskImageRequests(settings, images, disk)
        self.installation = installation
        self.snapshots = DiskImageSnapshots(self.requests, runtime.netns, installation.blank)
        self.files: DiskImageFiles = DiskImageFiles(
            self.requests, images, installation, self.snapshots, self.migrations
        )

    async def prepare(self, tenant: Tenant, instance: Instance) -> None:
        """Make the disk before the first start. Copies wait for each other, and for nothing else."""
        try:
            await in_thread(_copiers, partial(self.files.make_disk, tenant, instance))
        except OSError as error:
            what = f"the disk of {instance.name} can't be made: {error.strerror}"
            raise Failed(what, "free some space, and start it again") from None

    def _disk_size(self, instance: Instance) -> int:
        return disk_size(instance.spec, disk_of(instance))

    def check_disks(self, instance: Instance, disks: Sequence[FurtherDisk], *, active: bool) -> None:
        """Also refuse a change while it runs to a machine whose disks are no virtio's: nothing can be plugged into the
        controllers of a PC of old."""
        check_further(disks)
        if active and devices(instance) == "full":
            what = f"{instance.name} has disks of a PC (IDE or AHCI), which can't come or go while it runs"
            raise Conflict(what, "stop it before, or use machines with --devices para")

    async def attach_disks(self, instance: Instance) -> None:
        for drive, cd in enumerate(disk_of(instance).cds):
            with Rollback() as opened:
                file = [opened.hold(await in_thread(None, partial(self.files.open_cd, cd)))] if cd else []
                question = {"ask": "insert", "drive": drive, "cd": cd and cd.digest}
                await asked(self.runtime.netns(instance.id), question, file)
        await super().attach_disks(instance)

    async def screenshot(self, instance_id: str) -> bytes:
        return await screen.picture(partial(self.runtime.netns, instance_id))

    async def vnc(self, instance_id: str) -> socket.socket:
        return await screen.view(partial(self.runtime.netns, instance_id))

    async def guest_report(self, instance_id: str) -> GuestReport:
        return await ask_guest(self.runtime.netns(instance_id))

    # -- what needs an agent --------------------------------------------------------------------------------------

    async def prepare_exec(self, tenant: Tenant, instance: Instance, spec: ExecSpec) -> object:
        raise no_agent(instance.name, "exec")

    @asynccontextmanager
    async def holder(self, tenant: Tenant, instance: Instance, networks: Sequence[Network]) -> AsyncIterator[Running]:
        raise no_agent(instance.name, "cp")
        yield

    def archive(
        self, verb: Literal["write", "read", "export"], process: Running, path: str, copy: str | None = None
    ) -> AbstractAsyncContextManager[Archive]:
        raise no_agent("this instance", "cp")
