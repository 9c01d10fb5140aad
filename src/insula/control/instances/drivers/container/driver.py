"""`ContainerDriver`: runs instances as OCI containers with `insula.container`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

from insula.container import archive_worker
from insula.container.log import LogReader
from insula.container.service.client import Exec, ExitRecord, ProcessState, ProcessStreams, Runtime
from insula.control.instances.drivers.base import (
    Archive,
    Connect,
    CreateOptions,
    DriverFeature,
    GroupCounters,
    MemoryEvents,
    Observed,
    ObservedState,
    Running,
)
from insula.control.instances.drivers.container import explain, mount_points, processes, spec
from insula.control.instances.drivers.container.hints import hint
from insula.control.instances.drivers.container.request import Requests
from insula.control.instances.drivers.container.terminals import Terminals
from insula.control.instances.drivers.directory import LaunchRecord, boot_id
from insula.control.instances.drivers.groups import counters
from insula.control.instances.drivers.migration import Migrations
from insula.control.instances.drivers.snapshots import SnapshotFiles
from insula.image.store import ImageStore
from insula.kernel import process
from insula.kernel.cgroups import Cgroup, hierarchy
from insula.kernel.cgroups.hierarchy import of_process
from insula.kernel.cgroups.v1 import frozen_elsewhere
from insula.model.disks import FurtherDisk
from insula.model.errors import InsulaError, Invalid, NotFound, Unavailable
from insula.model.guests import GuestReport
from insula.model.objects import Exit, Instance, InstanceStatus, Network, Port, Resources, Tenant
from insula.model.views import ExecSpec, Explanation, Layer, ProcessView
from insula.network.fabric import NetnsNic, Nic, Places
from insula.settings import Settings
from insula.volume.quota import DiskQuota


class ContainerDriver:
    """The driver of containers; the methods are described in `Driver`."""

    kind = "container"
    features: frozenset[DriverFeature] = frozenset(get_args(DriverFeature)) - {
        "snapshots",
        "forks",
        "migrate",
        "screenshot",
        "vnc",
        "answers",
        "guest-report",
    }
    snapshots: SnapshotFiles | None = None
    migrations: Migrations | None = None

    def __init__(self, settings: Settings, images: ImageStore, disk: DiskQuota) -> None:
        self.runtime = Runtime(settings.run, settings.spares, hint)
        self.requests = Requests(settings, images, disk)
        self._settings = settings
        self._images = images
        self._terminals = Terminals(settings.run / "terminals")
        self._tasks: set[asyncio.Task[None]] = set()

    # -- this host ------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        return self.runtime.trouble

    async def open(self) -> None:
        with contextlib.suppress(OSError):  # each launch takes longer then, and that is all
            mount_points.make(self.requests.mount_points)
        await self.runtime.open(wait=False)

    async def close(self) -> None:
        for task in self._tasks:  # the next insulad does the rest
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.runtime.close()

    async def take_down(self) -> None:
        for container in self.runtime.ids():
            await self.runtime.delete(container)
        await self.runtime.withdraw()
        self._terminals.restore()

    def make_room(self, instances: int) -> None:
        self._terminals.make_room(instances)

    def ids(self) -> set[str]:
        return set(self.runtime.ids())

    async def release_layer(self, path: str) -> None:
        await self.runtime.forget_layer(path)

    # -- the life of an instance ----------------------------------------------------------------------------------

    def reserve(self, tenant: str) -> str:
        return self.runtime.choose_id(self.requests.parent(tenant))

    async def validate(self, tenant: Tenant, draft: Instance) -> None:
        await self.requests.check(tenant, draft)

    async def prepare(self, tenant: Tenant, instance: Instance) -> None:
        """Do nothing: its layers are there."""

    async def create(self, tenant: Tenant, instance: Instance, options: CreateOptions) -> None:
        connect, offered = options.connect, self.runtime.warm(instance.id)
        if connect is None:
            await self._create(tenant, instance, options)
            return
        if offered and (nic := self._nic(offered)):
            connecting = connect(nic)
            await asyncio.sleep(0)  # its thread starts; to make the request keeps the event loop
            made, connected = await asyncio.gather(
                self._create(tenant, instance, options), connecting, return_exceptions=True
            )
            if isinstance(made, BaseException):
                raise made
            if made == offered:
                if connected is not None:
                    raise connected
                return
        else:
            await self._create(tenant, instance, options)
        await connect(self.nic(instance.id))

    def _nic(self, process: ProcessState) -> Nic | None:
        """The network namespace of the first process of a warm container; None if it is gone."""
        with contextlib.suppress(NotFound):
            return NetnsNic(self.runtime.netns(process.id, process))
        return None

    async def _create(self, tenant: Tenant, instance: Instance, options: CreateOptions) -> ProcessState:
        request = await self.requests.launch(tenant, instance, options.networks)
        if joined := options.joined:
            request = request._replace(share=[joined.pid, joined.start_time])
        request.config["process"] |= spec.console_size(options.console)
        try:
            return await self.runtime.create(request)
        finally:
            self.requests.settle(instance)

    def nic(self, instance_id: str) -> Nic:
        return NetnsNic(self.runtime.netns(instance_id))

    async def plug(self, instance: Instance, beside: Places, missing: Places, connect: Connect) -> None:
        await connect(self.nic(instance.id))

    async def unplug(self, instance: Instance, port: Port, beside: Places) -> None:
        """Do nothing: the device is the fabric's."""

    async def start(self, instance_id: str) -> Running:
        state = await self.runtime.start(instance_id)
        return Running(state.pid, state.start_time, state.started)

    def is_ready(self, instance_id: str) -> bool:
        """True: `start` returns when the program is executed."""
        return True

    async def ready(self, instance_id: str) -> bool:
        return True

    async def failure(self, instance_id: str) -> InsulaError | None:
        return await self.runtime.failure(instance_id)

    def signal(self, instance_id: str, number: int, exec_id: str | None = None, *, group: bool = False) -> None:
        self.runtime.signal(instance_id, number, exec_id, group=group)

    def frozen_elsewhere(self, instance_id: str) -> str | None:
        state = self.runtime.state(instance_id)
        return frozen_elsewhere(state.pid) if state else None

    async def answers(self, instance_id: str) -> AsyncIterator[bool]:
        """Nothing: nobody in a container is asked."""
        return
        yield True

    async def sync(self, instance_id: str) -> None:
        """Do nothing: the host's kernel has what they have written."""

    async def pause(self, instance_id: str) -> None:
        await self.runtime.pause(instance_id)

    async def resume(self, instance_id: str) -> None:
        await self.runtime.resume(instance_id)

    def check_resize(self, instance: Instance, resources: Resources, state: str) -> None:
        """Do nothing: the kernel takes any limits."""

    async def resize(self, instance: Instance) -> Sequence[str]:
        await self.runtime.update(instance.id, spec.update(instance.spec.resources))
        return ()

    def check_disks(self, instance: Instance, disks: Sequence[FurtherDisk], *, active: bool) -> None:
        raise Invalid(f"{instance.name} is a container, which has no disks", "`insula run --vm` makes virtual machines")

    async def attach_disks(self, instance: Instance) -> None:
        """Do nothing: containers have none."""

    async def wait(self, instance_id: str, exec_id: str | None = None) -> Exit:
        return _as_exit(await self.runtime.wait(instance_id, exec_id))

    async def flushed(self, instance_id: str, exec_id: str | None = None) -> None:
        await self.runtime.flushed(instance_id, exec_id)

    def observe(self, instance: Instance, status: InstanceStatus) -> Observed:
        directory = self.requests.directory(instance.id)
        record, damaged = directory.record(), self.runtime.damaged(instance.id)
        if "state.json" in damaged and status.pid and self._is_its_process(instance, status):
            known = ProcessState(instance.id, status.pid, status.start_time or 0, status.started, executed=True)
            self.runtime.restore(known)
        state, running = self._state(instance)
        if record is None and directory.is_damaged():
            damaged.append(str(directory.path / "launch.json"))
            if state in ("running", "paused") and status.starts == instance.starts:
                record = LaunchRecord(starts=instance.starts, boot=boot_id())
                directory.write_record(record)
        return Observed(state, running, record, damaged)

    def _state(self, instance: Instance) -> tuple[ObservedState, Running | None]:
        found = self.runtime.state(instance.id)
        if found is None:
            return "none", None
        running = Running(found.pid, found.start_time, found.started)
        if not process.is_alive(found.pid, found.start_time):
            return ("ended" if found.executed or found.started is not None else "none"), running
        if not found.executed:
            return "created", running
        return ("paused" if Cgroup(self.requests.cgroup(instance)).frozen() else "running"), running

    def _is_its_process(self, instance: Instance, status: InstanceStatus) -> bool:
        """Whether the process in the stored status is the one of the instance's last start."""
        if status.pid is None or status.starts != instance.starts:
            return False
        group = self.requests.cgroup(instance)
        return process.is_alive(status.pid, status.start_time) and f"{of_process(status.pid)}/".startswith(f"{group}/")

    async def discard(self, instance: Instance) -> None:
        await self.runtime.delete(instance.id, self.requests.cgroup(instance))

    async def discard_stray(self, instance_id: str) -> None:
        await self.runtime.delete(instance_id)

    def writable(self, instance_id: str) -> Path | None:
        return self.requests.directory(instance_id).upper

    async def remove_directory(self, instance_id: str) -> None:
        await self.requests.directory(instance_id).remove()

    def end_of_boot(self, instance_id: str) -> None:
        self.requests.directory(instance_id).end_of_boot()

    # -- a running instance ---------------------------------------------------------------------------------------

    async def prepare_exec(self, tenant: Tenant, instance: Instance, spec: ExecSpec) -> object:
        return await self.requests.execution(tenant, instance, spec)

    async def exec(
        self,
        instance_id: str,
        prepared: object,
        exec_id: str | None = None,
        *,
        stdin: bool = False,
        detach: bool = False,
    ) -> str:
        wanted = Exec(cast(dict[str, Any], prepared), stdin=stdin, detach=detach)
        if exec_id is None:
            return await self.runtime.exec(instance_id, wanted)
        await self.runtime.exec_as(instance_id, exec_id, wanted)
        return exec_id

    def execs(self, instance_id: str) -> list[str]:
        return self.runtime.execs(instance_id)

    def forget_exec(self, instance_id: str, exec_id: str) -> None:
        self.runtime.forget(instance_id, exec_id)

    async def attach(self, instance_id: str, exec_id: str | None = None, *, stdin: bool = False) -> ProcessStreams:
        return await self.runtime.attach(instance_id, exec_id, stdin=stdin)

    def has_exited(self, instance_id: str) -> bool:
        return self.runtime.exit(instance_id) is not None

    def log(self, instance_id: str, *, since: float = 0.0, tail: int | None = None) -> LogReader:
        return LogReader(str(self.requests.directory(instance_id).log), since_ns=int(since * 1e9), tail=tail)

    @asynccontextmanager
    async def holder(self, tenant: Tenant, instance: Instance, networks: Sequence[Network]) -> AsyncIterator[Running]:
        container = secrets.token_hex(16)
        request = await self.requests.holder(tenant, instance, networks, container)
        try:
            try:
                state = await self.runtime.create(request)
            finally:
                self.requests.settle(instance)
            await self.runtime.start(container)
            yield Running(state.pid, state.start_time, time.time())
        finally:
            await asyncio.shield(self._spawn(self.runtime.delete(container)))

    def archive(
        self, verb: Literal["write", "read", "export"], process: Running, path: str, copy: str | None = None
    ) -> AbstractAsyncContextManager[Archive]:
        return archive_worker.started(verb, process.pid, process.start_time, path, copy)

    async def screenshot(self, instance_id: str) -> bytes:
        """Unavailable: a container has no screen."""
        raise Unavailable("this instance has no screen", "`insula logs` shows its output")

    async def vnc(self, instance_id: str) -> socket.socket:
        """Unavailable, as above."""
        raise Unavailable("this instance has no screen", "`insula logs` shows its output")

    async def guest_report(self, instance_id: str) -> GuestReport:
        """Nothing: there is no agent of QEMU in a container."""
        return GuestReport(answered=False)

    def memory_events(self, instance: Instance) -> MemoryEvents:
        return Cgroup(self.requests.cgroup(instance)).oom_notifications()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- observation ----------------------------------------------------------------------------------------------

    def stats(self, instances: Sequence[Instance]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for instance in instances:
            with contextlib.suppress(OSError):  # it has just ended
                counters = found[instance.id] = Cgroup(self.requests.cgroup(instance)).stats()
                # with version 1 recent kernels count nothing until I/O is limited; then it is unknown, not 0
                counters.setdefault("io", None if hierarchy().version == 1 else {})
        return found

    def counters(self, tenant: str, instance_id: str) -> GroupCounters | None:
        return counters(Cgroup(f"{self.requests.parent(tenant)}/{instance_id}"))

    def ended(self, instance: Instance) -> GroupCounters | None:
        group = Cgroup(self.requests.cgroup(instance))
        return counters(group) if group.is_empty() else None

    def end(self, instance: Instance) -> GroupCounters | None:
        group = Cgroup(self.requests.cgroup(instance))
        group.empty()
        return counters(group)

    def processes(self, tenant: Tenant, instance_id: str) -> list[ProcessView]:
        return processes.views(self.runtime.processes(instance_id), tenant.id_base)

    def explain(
        self, tenant: Tenant, instance: Instance, status: InstanceStatus, near: Mapping[str, Running]
    ) -> Explanation:
        group = Cgroup(self.requests.cgroup(instance))
        parent, there = Cgroup(os.path.dirname(group.path)), group.exists()
        pid = status.pid
        return Explanation(
            instance=instance,
            status=status,
            processes=self.processes(tenant, instance.id) if pid else [],
            namespaces=explain.with_instances(explain.namespaces(pid), near) if pid else [],
            uid_map=explain.uid_map(pid) if pid else None,
            cgroups=group.directories() if there else {},
            limits=group.values() if there else {},
            tenant_limits=parent.values() if there else {},
            security=explain.security(pid) if pid else {},
            layers=self._layers(instance),
            upper=str(self.requests.directory(instance.id).upper),
            rules=None,
            pressure=explain.pressure(group) if pid else {},
        )

    def _layers(self, instance: Instance) -> list[Layer]:
        """Top-most first, as overlayfs stacks them."""
        found = []
        for digest in reversed(instance.root.layers):
            with contextlib.suppress(InsulaError):
                found.append(Layer(digest=digest, path=str(self._images.lower([digest])[0])))
        return found


def _as_exit(record: ExitRecord) -> Exit:
    return Exit(exit_status=record.exit_status, signal=record.signal, oom=record.oom, finished=record.finished)
