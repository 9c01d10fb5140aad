"""`MachineDriver`: runs instances as virtual machines, each in a container with QEMU.

All that is done to a container from outside is done to this one: signals, streams, exec, logs, limits and records are
those of `ContainerDriver`. What differs is what runs in it, and the nic, which is a tap.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import msgspec

from insula.container.service.client import Runtime
from insula.control.instances.drivers.base import Archive, Connect, CreateOptions, DriverFeature, Observed, Running
from insula.control.instances.drivers.container import spec
from insula.control.instances.drivers.container.driver import ContainerDriver
from insula.control.instances.drivers.container.spec import console_size
from insula.control.instances.drivers.machine import checks, disk, files, further_disks, jail, plugging, resizing
from insula.control.instances.drivers.machine.holder import MachineHolder
from insula.control.instances.drivers.machine.migration import MachineMigrations
from insula.control.instances.drivers.machine.moment import programs_held
from insula.control.instances.drivers.machine.readiness import MachineReadiness
from insula.control.instances.drivers.machine.request import FIRST, MachineRequests, MachineStart, installation
from insula.control.instances.drivers.machine.shim import Conversation, ask, failure
from insula.control.instances.drivers.machine.sizes import disk_size
from insula.control.instances.drivers.machine.snapshots import MachineSnapshots
from insula.control.instances.drivers.machine.start_files import StartFiles
from insula.control.tasks import together
from insula.image.store import ImageStore
from insula.kernel import tap
from insula.kernel.rollback import Rollback
from insula.machine.installation import GuestSize
from insula.model.disks import FurtherDisk
from insula.model.errors import InsulaError, NotFound
from insula.model.objects import Instance, InstanceStatus, Network, Port, Resources, Tenant, disks_of
from insula.model.units import parse_size
from insula.model.views import Explanation
from insula.network.fabric import Nic, Places, TapNic
from insula.settings import Settings
from insula.volume.quota import DiskQuota

_LOOK = 60.0  # seconds until it is looked again whether a template can be made in advance
_PATIENCE = 5.0  # seconds for a program to be executed, before nobody waits for that


class MachineDriver(ContainerDriver):
    """The driver of virtual machines. The runtime is that of the containers' driver, which opens and closes it."""

    kind = "machine"
    features: frozenset[DriverFeature] = frozenset(get_args(DriverFeature)) - {"screenshot", "vnc", "guest-report"}

    def __init__(self, settings: Settings, images: ImageStore, disk: DiskQuota, runtime: Runtime) -> None:
        super().__init__(settings, images, disk)
        self.runtime = runtime
        self.requests: MachineRequests = MachineRequests(settings, images, disk)
        self._machines = settings.machines
        self.installation = installation(settings)
        self.snapshots: MachineSnapshots = MachineSnapshots(self.requests, runtime.netns, self.installation.blank)
        self.migrations: MachineMigrations = MachineMigrations(self._directory, self.requests.disk, runtime.netns)
        self.files = StartFiles(self.requests, images, self.installation, self.snapshots, self.migrations)
        self._holder = MachineHolder(runtime, self.requests, self.files, self.installation, self._spawn)
        self._holding: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.readiness = MachineReadiness(self._directory, runtime.netns, self.migrations.question, self._gone_on)

    def _directory(self, instance_id: str) -> Path:
        return self.requests.directory(instance_id).path

    def _gone_on(self, instance_id: str) -> None:
        """Forget what a machine has gone on from, or where it came from: from now on its disk is its own. Blocks."""
        self.snapshots.finish(instance_id)
        self.migrations.finish(instance_id)

    # -- this host ------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """None: the runtime's trouble is told by the containers' driver."""
        return None

    async def open(self) -> None:
        """Make what machines share in the background, if the host has what they need: no start waits for it then."""
        if memory := parse_size(self._machines.template):
            self._spawn(self._make_template(GuestSize(memory >> 20)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self.installation.close)
        self.snapshots.close()

    async def _make_template(self, size: GuestSize) -> None:
        """Make a template in advance, as soon as the host has what machines need."""
        while not await asyncio.to_thread(self.installation.prepare, size):
            await asyncio.sleep(_LOOK)

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

    def reserve(self, tenant: str) -> str:
        """An ID of no warm container: a machine's container is not made from one, which would stay beside it unused."""
        return secrets.token_hex(16)

    async def validate(self, tenant: Tenant, draft: Instance) -> None:
        """Also make what machines share, since that takes longer than a start may take."""
        if refused := checks.refusal(self._machines):
            raise refused
        await self.requests.check(tenant, draft)
        await asyncio.to_thread(self.files.prepare, tenant, draft)

    async def create(self, tenant: Tenant, instance: Instance, options: CreateOptions) -> None:
        self.readiness.forget(instance.id)
        arriving = await asyncio.to_thread(self.migrations.expected, instance)
        image = await asyncio.to_thread(self.files.prepare, tenant, instance)
        program = await self.requests.launch(tenant, instance, options.networks)
        size = console_size(options.console)
        program.config["process"] |= size
        with Rollback() as opened:
            given, resumed = await asyncio.to_thread(self.files.open, tenant, instance, image, options.networks, opened)
            ports = instance.plugged if options.connect else []
            for port in ports:
                given[port.interface] = opened.hold(await asyncio.to_thread(tap.make))
            generation = self.readiness.give(instance.id)
            numbers = {name: number for number, name in enumerate(given, FIRST + 1)}
            how = (await asyncio.to_thread(self.installation.accelerator)).name
            start = MachineStart(numbers, generation, how, resumed, arriving)
            plan = self.requests.plan(instance, options.networks, program.config, start)
            opened.hold(plan)
            copy = "memory" in given
            launch = self.requests.machine(tenant, instance, program, self.installation.root(), how, copy=copy)
            launch.config["process"] |= size
            work: list[Awaitable[object]] = [self.runtime.create(launch, [plan, *given.values()])]
            if options.connect:
                work += [options.connect(TapNic(os.dup(given[port.interface])), port.index) for port in ports]
            try:
                await together(*work)
            finally:
                self.requests.settle(instance)

    def is_ready(self, instance_id: str) -> bool:
        """Whether the agent has answered with the number that the machine was given, and the program runs."""
        return self.readiness.is_ready(instance_id)

    async def ready(self, instance_id: str) -> bool:
        return await self.readiness.wait(instance_id)

    async def answers(self, instance_id: str) -> AsyncIterator[bool]:
        shim = await Conversation.begin(self.runtime.netns(instance_id), {"ask": "answers"}, [], "it is not known")
        with contextlib.closing(shim):
            while True:
                yield bool(await shim.told("answers", None))

    async def failure(self, instance_id: str) -> InsulaError | None:
        return self.readiness.failure(instance_id) or await super().failure(instance_id)

    async def remove_directory(self, instance_id: str) -> None:
        self.readiness.forget(instance_id)
        await super().remove_directory(instance_id)

    async def exec(
        self,
        instance_id: str,
        prepared: object,
        exec_id: str | None = None,
        *,
        stdin: bool = False,
        detach: bool = False,
    ) -> str:
        """Start the process that stands for one in the guest, and wait until that is executed there. `StartFailed`; if
        the machine takes long, its output says what happens."""
        made = await super().exec(instance_id, prepared, exec_id, stdin=stdin, detach=detach)
        name = cast(dict[str, Any], prepared)["args"][-1]
        with contextlib.suppress(NotFound, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                answer = await ask(self.runtime.netns(instance_id), {"ask": "started", "name": name})
            if answer and "failed" in answer:
                async with asyncio.timeout(_PATIENCE):
                    await self.wait(instance_id, made)
                self.forget_exec(instance_id, made)
                raise failure(answer["failed"])
        return made

    async def sync(self, instance_id: str) -> None:
        """Have the guest write to its disk what is in its memory alone: its programs are held for that."""
        with contextlib.suppress(NotFound):
            async with programs_held(self.runtime.netns(instance_id)):
                pass

    async def pause(self, instance_id: str) -> None:
        """Freeze it, and its programs before: they go on when it has been told the time again, and not before."""
        async with programs_held(self.runtime.netns(instance_id)):
            await super().pause(instance_id)

    async def resume(self, instance_id: str) -> None:
        """Thaw it, and have it take another identity, with the time: it was stopped in between."""
        if not await asyncio.to_thread(self._is_frozen, instance_id):
            await super().resume(instance_id)  # others may have frozen a group below
            return
        number = self.readiness.give(instance_id)
        await super().resume(instance_id)
        await self.readiness.renew(instance_id, number)

    def _is_frozen(self, instance_id: str) -> bool:
        group = self.runtime.cgroup(instance_id)
        return group is not None and group.frozen()

    def observe(self, instance: Instance, status: InstanceStatus) -> Observed:
        found = super().observe(instance, status)
        if found.state == "running" and not self.readiness.is_ready(instance.id):
            return found._replace(state="starting")
        return found

    def nic(self, instance_id: str) -> Nic:
        """The tap of a machine that runs, which is QEMU's."""
        return TapNic(None)

    def check_disks(self, instance: Instance, disks: Sequence[FurtherDisk], *, active: bool) -> None:
        """Do nothing: it takes any."""

    async def attach_disks(self, instance: Instance) -> None:
        netns, directory = partial(self.runtime.netns, instance.id), self.requests.further_disks(instance.id)
        await further_disks.attach(netns, directory, instance, self.installation.blank)

    async def plug(self, instance: Instance, beside: Places, missing: Places, connect: Connect) -> None:
        await plugging.plug(partial(self.runtime.netns, instance.id), beside, missing, connect)

    async def unplug(self, instance: Instance, port: Port, beside: Places) -> None:
        await plugging.unplug(self.runtime.netns(instance.id), port.index, beside)

    def check_resize(self, instance: Instance, resources: Resources, state: str) -> None:
        after = msgspec.structs.replace(instance, spec=msgspec.structs.replace(instance.spec, resources=resources))
        resizing.check(instance, after, state, self._disk_size(instance), self._disk_size(after))

    async def resize(self, instance: Instance) -> Sequence[str]:
        """Have container and guest grow. What the guest has of memory it keeps until its next start."""
        netns, wanted = partial(self.runtime.netns, instance.id), instance.spec.resources
        has = await resizing.size(netns())
        most = msgspec.structs.replace(wanted, memory=max(wanted.memory or 0, has.memory << 20))
        await self.runtime.update(instance.id, spec.update(jail.resources(most, copy=True)))
        return await resizing.grow(netns(), instance, has, self._disk_size(instance))

    def _disk_size(self, instance: Instance) -> int:
        """Bytes of the disk that an instance has by its spec."""
        return disk_size(instance.spec)

    @asynccontextmanager
    async def holder(self, tenant: Tenant, instance: Instance, networks: Sequence[Network]) -> AsyncIterator[Running]:
        """One of each tenant at a time: its memory is not reserved."""
        async with self._holding[tenant.name], self._holder.held(tenant, instance) as process:
            yield process

    def archive(
        self, verb: Literal["write", "read", "export"], process: Running, path: str, copy: str | None = None
    ) -> AbstractAsyncContextManager[Archive]:
        return files.opened(verb, process, path, copy)

    def explain(
        self, tenant: Tenant, instance: Instance, status: InstanceStatus, near: Mapping[str, Running]
    ) -> Explanation:
        found = super().explain(tenant, instance, status, near)
        if found.security:
            found.security["processors"] = checks.processors(self.installation.accelerator())
        path = self.requests.disk(instance.id)
        further = [self.requests.further_disks(instance.id) / each.name for each in disks_of(instance.spec)]
        return msgspec.structs.replace(found, upper=str(path), disk=disk.view([path, *further]))

    def writable(self, instance_id: str) -> Path | None:
        """None: a disk can't grow beyond its size."""
        return None
