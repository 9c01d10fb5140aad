"""The registry of fabrics, by the name in the setting `fabric`. A new fabric is a new entry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

from insula.model.errors import Invalid
from insula.network.fabric import Fabric
from insula.network.linux.fabric import LinuxFabric
from insula.settings import Settings


def _linux(settings: Settings) -> Fabric:
    return LinuxFabric(
        settings.run,
        settings.prefix,
        range4=settings.network.range4,
        range6=settings.network.range6,
        resolvers=settings.network.resolvers,
        groups=settings.prefix,
        floating=settings.network.floating,
    )


FABRICS: dict[str, Callable[[Settings], Fabric]] = {"linux": _linux}


async def open_fabric(settings: Settings, closing: AsyncExitStack) -> Fabric:
    """Open the fabric that the settings name. `closing` closes it, after waiting for threads that use it. Raises
    InsulaError."""
    make = FABRICS.get(settings.fabric)
    if make is None:
        raise Invalid(f"there is no fabric {settings.fabric}", f"set fabric to one of {', '.join(sorted(FABRICS))}")
    fabric = make(settings)
    await asyncio.to_thread(fabric.open)
    closing.push_async_callback(asyncio.to_thread, fabric.close)
    return fabric
