"""The registry of drivers, by kind of instance. A new kind is a new entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from insula.control.instances.drivers.base import Driver
from insula.control.instances.drivers.container.driver import ContainerDriver
from insula.image.store import ImageStore
from insula.settings import Settings
from insula.volume.quota import DiskQuota

DRIVERS: dict[str, Callable[[Settings, ImageStore, DiskQuota], Driver]] = {ContainerDriver.kind: ContainerDriver}


async def open_drivers(
    settings: Settings, images: ImageStore, disk: DiskQuota, closing: AsyncExitStack
) -> Mapping[str, Driver]:
    """Open all drivers and return them by kind. `closing` closes them. InsulaError."""
    opened = {}
    for kind, make in DRIVERS.items():
        driver = opened[kind] = make(settings, images, disk)
        await driver.open()
        closing.push_async_callback(driver.close)
    return opened
