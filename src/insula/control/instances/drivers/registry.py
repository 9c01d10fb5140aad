"""The registry of drivers, by kind of instance. A new kind is a new entry. Virtual machines run in containers,
so their drivers use the runtime of the containers' driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from insula.control.instances.drivers.base import Driver
from insula.control.instances.drivers.container.driver import ContainerDriver
from insula.control.instances.drivers.machine.disk_image import DiskImageDriver
from insula.control.instances.drivers.machine.driver import MachineDriver
from insula.control.instances.drivers.xen.driver import XenDriver
from insula.image.store import ImageStore
from insula.settings import Settings
from insula.volume.quota import DiskQuota

DRIVERS: dict[str, Callable[[Settings, ImageStore, DiskQuota], Driver]] = {ContainerDriver.kind: ContainerDriver}


async def open_drivers(
    settings: Settings, images: ImageStore, disk: DiskQuota, closing: AsyncExitStack
) -> Mapping[str, Driver]:
    """Open all drivers and return them by kind. `closing` closes them. InsulaError."""
    drivers = {kind: make(settings, images, disk) for kind, make in DRIVERS.items()}
    if isinstance(containers := drivers.get(ContainerDriver.kind), ContainerDriver):
        by_xen = settings.machines.hypervisor.startswith("xen:")
        machines = (XenDriver if by_xen else MachineDriver)(settings, images, disk, containers.runtime)
        drivers[MachineDriver.kind] = machines
        drivers[DiskImageDriver.kind] = DiskImageDriver(
            settings, images, disk, containers.runtime, machines.installation
        )
    for driver in drivers.values():
        await driver.open()
        closing.push_async_callback(driver.close)
    return drivers
