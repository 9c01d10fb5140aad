"""A machine that holds the files of an instance which does not run, for `insula cp` and `insula export`.

Its container has an ID of its own, so that after a crash it can't be taken for the instance: the next insulad removes
it. It has the instance's disk, which is locked meanwhile, no network, and no program: the agent only holds the root.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from signal import SIGTERM
from typing import Any, Final

import msgspec

from insula.container.service.client import Runtime
from insula.control.instances.drivers.base import Running
from insula.control.instances.drivers.container.request import asleep
from insula.control.instances.drivers.machine.request import FIRST, MachineRequests, MachineStart
from insula.control.instances.drivers.machine.shim import ask
from insula.control.instances.drivers.machine.start_files import StartFiles
from insula.kernel.rollback import Rollback
from insula.machine.installation import Installation
from insula.model.errors import Failed, InsulaError
from insula.model.objects import Instance, MachineOptions, Tenant

_PATIENCE: Final = 60.0  # seconds for its start
_END: Final = 15.0  # and for its end, in which it writes what is to be written
_AGAIN: Final = 0.02


class MachineHolder:
    """Makes such machines. `spawn` starts a task that goes on if its caller is cancelled."""

    def __init__(
        self,
        runtime: Runtime,
        requests: MachineRequests,
        files: StartFiles,
        installation: Installation,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._runtime, self._requests, self._files = runtime, requests, files
        self._installation, self._spawn = installation, spawn

    @asynccontextmanager
    async def held(self, tenant: Tenant, instance: Instance) -> AsyncIterator[Running]:
        """The first process of such a machine, as long as the body runs. Conflict, Unavailable, Failed."""
        container = secrets.token_hex(16)
        try:
            yield await self._start(tenant, _alone(instance), container)
        finally:
            await asyncio.shield(self._spawn(self._end(container)))

    async def _start(self, tenant: Tenant, instance: Instance, container: str) -> Running:
        image = await asyncio.to_thread(self._files.prepare, tenant, instance)
        program = await self._requests.beside(tenant, instance, [], container)
        generation = os.urandom(16).hex()
        with Rollback() as opened:
            given = await asyncio.to_thread(self._files.hold, tenant, instance, image, opened)
            numbers = {name: number for number, name in enumerate(given, FIRST + 1)}
            how = (await asyncio.to_thread(self._installation.accelerator)).name
            start = MachineStart(numbers, generation, how, hold=True)
            plan = self._requests.plan(instance, [], program.config, start)
            opened.hold(plan)
            copy = "memory" in given
            launch = self._requests.machine(tenant, instance, program, self._installation.root(), how, copy=copy)
            try:
                state = await self._runtime.create(launch, [plan, *given.values()])
            finally:
                self._requests.settle(instance)
        await self._runtime.start(container)
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._ready(container, generation)
        except TimeoutError:
            what = f"the machine with the files of {instance.name} does not start in time"
            raise Failed(what, "look at the load of the host") from None
        return Running(state.pid, state.start_time, time.time())

    async def _ready(self, container: str, generation: str) -> None:
        """Wait until the agent has answered with the generation, and holds the root. Failed, NotFound."""
        while (answer := await ask(self._runtime.netns(container), {"ask": "ready"})) is None:
            await asyncio.sleep(_AGAIN)
        if answer.get("generation") != generation:
            raise Failed("the machine can't hold its files", "start it, and copy while it runs")

    async def _end(self, container: str) -> None:
        """Have it turn itself off, and remove it."""
        with suppress(InsulaError, TimeoutError):
            async with asyncio.timeout(_END):
                self._runtime.signal(container, SIGTERM)
                await self._runtime.wait(container)
        await self._runtime.delete(container)


def _alone(instance: Instance) -> Instance:
    """An instance with the disk of this one and without a program, ports and further disks, whose disk is kept."""
    found = asleep(instance)
    options = found.spec.options
    assert isinstance(options, MachineOptions)
    spec = msgspec.structs.replace(
        found.spec, options=msgspec.structs.replace(options, disks=[]), remove=False, restart="no"
    )
    return msgspec.structs.replace(found, spec=spec, ports=[])
