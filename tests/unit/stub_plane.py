"""A control plane in memory, for tests of the API and its clients alone: an "instance" is a process of this host.

It stands in for `insula.control`, not for the kernel: sockets, pipes, terminals and signals are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import termios
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import msgspec

from insula.control.allocation.in_flight import InFlight
from insula.control.allocation.limits import TenantLimits
from insula.control.allocation.quotas import limits_of, merge
from insula.control.allocation.rates import Rates
from insula.control.identities.authority import Authority
from insula.control.identities.cache import IdentityCache
from insula.control.identities.providers import Providers
from insula.control.instances.specs import relabelled
from insula.control.isolation_watch import IsolationWatch
from insula.control.plane import ControlPlane
from insula.control.problems import Problems
from insula.control.tasks import Tasks
from insula.model.errors import Conflict, Failed, NotFound
from insula.model.objects import (
    ConsoleSize,
    Exit,
    InstanceSpec,
    InstanceStatus,
    Limits,
    Network,
    NetworkAttachment,
    NetworkStatus,
    Tenant,
)
from insula.model.stream import RESIZE, Kind, encode
from insula.model.units import check_label
from insula.model.views import (
    ExecSpec,
    InstancePatch,
    InstanceStats,
    InstanceView,
    LimitsPatch,
    NetworkView,
    ProcessView,
    ResourcesPatch,
    StatsSample,
    TenantPatch,
    TenantView,
    Usage,
)
from tests.support import objects


class StubProcess:
    """A process with pipes or a terminal, in the shape of a runtime's attachment."""

    def __init__(self, command: list[str], *, tty: bool) -> None:
        self.command = command
        self.tty = tty
        self.frames: asyncio.Queue[tuple[Kind, bytes]] = asyncio.Queue(16)
        self.started = asyncio.Event()
        self.terminal: int | None = None
        self.process: asyncio.subprocess.Process | None = None
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        pipe: Any = asyncio.subprocess.PIPE
        ours = theirs = None
        if self.tty:
            ours, theirs = pty.openpty()
            pipe = theirs
        try:
            self.process = await asyncio.create_subprocess_exec(
                *self.command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except FileNotFoundError:
            error = Failed(f"cannot execute {self.command[0]}", "name a program that is there")
            error.exit_status = 127
            raise error from None
        finally:
            if theirs is not None:
                os.close(theirs)
        self.terminal = ours
        self.tasks = [asyncio.ensure_future(self._watch())]
        self.started.set()

    async def _watch(self) -> None:
        assert self.process is not None
        if self.terminal is not None:
            await self._read_terminal(self.terminal)
        else:
            await asyncio.gather(
                self._read(self.process.stdout, Kind.STDOUT), self._read(self.process.stderr, Kind.STDERR)
            )
        status = await self.process.wait()
        body = {"exit_status": 128 - status if status < 0 else status, "signal": None, "oom": False}
        await self.frames.put((Kind.EXIT, json.dumps(body).encode()))

    async def _read(self, stream: asyncio.StreamReader | None, kind: Kind) -> None:
        assert stream is not None
        while data := await stream.read(65536):
            await self.frames.put((kind, data))

    async def _read_terminal(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            while data := await asyncio.to_thread(os.read, fd, 65536):
                await self.frames.put((Kind.STDOUT, data))
        self.terminal = None
        os.close(fd)

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        await self.started.wait()
        assert self.process is not None
        if kind is Kind.RESIZE and self.terminal is not None:
            rows, columns = RESIZE.unpack(payload)
            fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
            self.process.send_signal(signal.SIGWINCH)  # the kernel does so only to a controlling terminal
        elif kind is Kind.STDIN and self.terminal is not None:
            os.write(self.terminal, payload)
        elif self.process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                if kind is Kind.STDIN:
                    self.process.stdin.write(payload)
                    await self.process.stdin.drain()
                elif kind is Kind.STDIN_EOF:
                    self.process.stdin.close()

    async def drain(self) -> None:
        """Read the rest of its output, so that its pipes are closed."""
        while any(not task.done() for task in self.tasks):
            with contextlib.suppress(asyncio.QueueEmpty):
                self.frames.get_nowait()
            await asyncio.sleep(0.001)

    async def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]:
        while True:
            kind, payload = await self.frames.get()
            yield kind, payload
            if kind is Kind.EXIT:
                return


class StubInstances:
    def __init__(self) -> None:
        self.views: dict[tuple[str, str], InstanceView] = {}
        self.processes_of: dict[str, StubProcess] = {}
        self.signals: list[tuple[str, str]] = []
        self.uploads: dict[str, bytes] = {}
        self.copies: dict[str, str | None] = {}
        self.broken_uploads = 0
        self.archives: dict[str, list[bytes]] = {}
        self.log: list[tuple[Kind, bytes]] = []

    def _find(self, tenant: str, name: str) -> InstanceView:
        try:
            return self.views[tenant, name]
        except KeyError:
            raise NotFound(f"tenant {tenant} has no instance {name}", "see `insula ps -a`") from None

    async def run(self, tenant: str, spec: InstanceSpec, *, by: Authority, start: bool = True) -> InstanceView:
        name = check_label("instance", spec.name or f"i{len(self.views)}")
        if (tenant, name) in self.views:
            raise Conflict(f"tenant {tenant} has an instance {name} already", "choose another name")
        instance = objects.instance(tenant=tenant, name=name, spec=spec, created=time.time())
        self.views[tenant, name] = InstanceView(instance=instance, status=InstanceStatus(state="created"))
        self.processes_of[name] = StubProcess(spec.command, tty=spec.tty)
        if start:
            await self.start(tenant, name, by=by)
        return self.views[tenant, name]

    async def run_attached(
        self, tenant: str, spec: InstanceSpec, console: ConsoleSize | None = None, *, by: Authority
    ) -> tuple[str, AbstractAsyncContextManager[StubProcess], asyncio.Task[InstanceView]]:
        name = (await self.run(tenant, spec, by=by, start=False)).instance.name
        streams = self.attach(tenant, name, replay=False, stdin=spec.stdin, start=True)
        return name, streams, asyncio.ensure_future(self.start(tenant, name, console, by=by))

    async def list(self, tenant: str | None) -> Sequence[InstanceView]:
        return [view for (owner, _), view in self.views.items() if tenant in (None, owner)]

    async def get(self, tenant: str, name: str) -> InstanceView:
        return self._find(tenant, name)

    async def start(self, tenant: str, name: str, console: ConsoleSize | None = None, *, by: Authority) -> InstanceView:
        view = self._find(tenant, name)
        await self.processes_of[name].start()
        process = self.processes_of[name].process
        status = InstanceStatus(state="running", pid=process.pid if process else None)
        self.views[tenant, name] = msgspec.structs.replace(view, status=status)
        return self.views[tenant, name]

    async def remove(self, tenant: str, name: str, *, force: bool = False) -> None:
        if self._find(tenant, name).status.state == "running" and not force:
            raise Conflict(f"{name} runs", "stop it first, or use --force")
        del self.views[tenant, name]

    async def update(
        self, tenant: str, name: str, patch: InstancePatch, keep: Mapping[str, str] = MappingProxyType({})
    ) -> InstanceView:
        view = self._find(tenant, name)
        limits = ResourcesPatch(**{each: getattr(patch, each) for each in ResourcesPatch.__struct_fields__})
        resources = merge(view.instance.spec.resources, limits)
        spec = msgspec.structs.replace(view.instance.spec, resources=resources)
        instance = msgspec.structs.replace(view.instance, spec=spec)
        self.views[tenant, name] = msgspec.structs.replace(view, instance=instance)
        return self.views[tenant, name]

    async def plug(self, tenant: str, name: str, attachment: NetworkAttachment) -> InstanceView:
        view = self._find(tenant, name)
        spec = msgspec.structs.replace(view.instance.spec, networks=[*view.instance.spec.networks, attachment])
        instance = msgspec.structs.replace(view.instance, spec=spec)
        self.views[tenant, name] = msgspec.structs.replace(view, instance=instance)
        return self.views[tenant, name]

    async def unplug(self, tenant: str, name: str, which: str) -> InstanceView:
        return self._find(tenant, name)

    async def pause(self, tenant: str, name: str) -> InstanceView:
        return self._state(tenant, name, "paused")

    async def unpause(self, tenant: str, name: str) -> InstanceView:
        return self._state(tenant, name, "running")

    def _state(self, tenant: str, name: str, state: Any) -> InstanceView:
        view = self._find(tenant, name)
        self.views[tenant, name] = msgspec.structs.replace(view, status=InstanceStatus(state=state))
        return self.views[tenant, name]

    async def kill(self, tenant: str, name: str, what: str) -> None:
        self._find(tenant, name)
        self.signals.append((name, what))
        process = self.processes_of[name].process
        if process is not None and what.isdigit():
            process.send_signal(int(what))

    async def wait(self, tenant: str, name: str) -> Exit:
        self._find(tenant, name)
        process = self.processes_of[name].process
        assert process is not None
        return Exit(exit_status=await process.wait(), finished=time.time())

    async def processes(self, tenant: str, name: str) -> Sequence[ProcessView]:
        self._find(tenant, name)
        return []

    @asynccontextmanager
    async def attach(
        self, tenant: str, name: str, *, replay: bool, stdin: bool, start: bool
    ) -> AsyncIterator[StubProcess]:
        self._find(tenant, name)
        yield self.processes_of[name]

    async def exec_create(self, tenant: str, name: str, spec: ExecSpec) -> str:
        self._find(tenant, name)
        process = self.processes_of["exec"] = StubProcess(spec.command, tty=spec.tty)
        await process.start()
        return "exec"

    @asynccontextmanager
    async def exec_attach(self, tenant: str, name: str, exec_id: str, *, stdin: bool) -> AsyncIterator[StubProcess]:
        yield self.processes_of[exec_id]

    async def exec_kill(self, tenant: str, name: str, exec_id: str, number: int) -> None:
        process = self.processes_of[exec_id].process
        assert process is not None
        process.send_signal(number)

    async def logs(self, tenant: str, name: str, **_: object) -> AsyncIterator[bytes]:
        self._find(tenant, name)
        for number, (kind, data) in enumerate(self.log):
            yield encode(kind, (number * 10**9).to_bytes(8, "big") + data)

    async def archive_get(self, tenant: str, name: str, path: str) -> AsyncIterator[bytes]:
        self._find(tenant, name)
        if path not in self.archives:
            raise NotFound(f"{path} is not there", "look with `insula exec NAME ls`")
        for piece in self.archives[path]:
            yield piece

    async def archive_put(
        self, tenant: str, name: str, path: str, pieces: AsyncIterator[bytes], copy: str | None = None
    ) -> None:
        self._find(tenant, name)
        self.copies[path] = copy
        data = b""
        try:
            async for piece in pieces:
                data += piece
        except Failed:
            self.broken_uploads += 1
            raise
        self.uploads[path] = data

    async def export(self, tenant: str, name: str) -> AsyncIterator[bytes]:
        self._find(tenant, name)
        for piece in self.archives["/"]:
            yield piece


class StubTenants:
    def __init__(self) -> None:
        self.views: dict[str, TenantView] = {}

    async def list(self) -> list[TenantView]:
        return list(self.views.values())

    async def get(self, name: str) -> TenantView:
        try:
            return self.views[name]
        except KeyError:
            raise NotFound(f"there is no tenant {name}", "`insula tenant ls` lists them") from None

    async def created(self) -> dict[str, int]:
        return {}

    async def create(self, name: str, limits: Any, labels: dict[str, str]) -> TenantView:
        check_label("tenant", name)
        if name in self.views:
            raise Conflict(f"there is a tenant {name} already", "choose another name")
        limits = limits_of(Limits(), limits)
        tenant = Tenant(name=name, index=0, id_base=0x40000000, limits=limits, labels=labels, created=time.time())
        self.views[name] = TenantView(tenant=tenant, usage=Usage())
        return self.views[name]

    async def update(self, name: str, patch: TenantPatch) -> TenantView:
        view = await self.get(name)
        changes = {each: value for each, value in msgspec.structs.asdict(patch).items() if value is not msgspec.UNSET}
        labels = relabelled(view.tenant.labels, changes.pop("labels", None) or {})
        limits = merge(view.tenant.limits, LimitsPatch(**changes)) if changes else view.tenant.limits
        tenant = msgspec.structs.replace(view.tenant, limits=limits, labels=labels)
        self.views[name] = msgspec.structs.replace(view, tenant=tenant)
        return self.views[name]

    async def remove(self, name: str) -> None:
        await self.get(name)
        del self.views[name]


class StubNetworks:
    async def list(self, tenant: str) -> list[NetworkView]:
        network = Network(
            tenant=tenant, name="default", index=0, vni=1, subnet="10.0.0.0/24", gateway="10.0.0.1", created=0.0
        )
        return [NetworkView(network=network, status=NetworkStatus(ready=True))]


class StubStats:
    """`asked` is what was asked for; three samples of one instance."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    async def of(
        self,
        tenant: str | None,
        names: Sequence[str] = (),
        *,
        interval: float | None = None,
        among: Sequence[str] | None = None,
        **_: object,
    ) -> AsyncIterator[StatsSample]:
        self.asked.append((tenant, *names, interval))
        if "nobody" in names:
            raise NotFound(f"tenant {tenant} has no instance nobody", "see `insula ps -a`")
        for number in range(1 if interval is None else 3):
            each = InstanceStats(tenant=tenant or "acme", name="web", state="running", cpu=number / 2)
            yield StatsSample(time=float(number), instances=[each])


class StubEvents:
    def __init__(self) -> None:
        self.items: list[dict[str, object]] = []
        self.asked: list[int | None] = []

    async def watch(
        self, from_revision: int | None, sees: Callable[[dict[str, Any]], bool]
    ) -> AsyncIterator[dict[str, object]]:
        self.asked.append(from_revision)
        for item in filter(sees, self.items):
            yield item
        raise Failed("the rest is lost", "begin again")


class StubSettings:
    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"


class StubContext:
    """Limits, which are none."""

    def __init__(self) -> None:
        self.limits: Any = TenantLimits(cast(Any, None), cast(Any, None))
        self.in_flight = InFlight(self.limits.of, None)
        self.rates = Rates(None)


class StubPlane(ControlPlane):
    """A subclass, because the framework checks what handlers are given."""

    def __init__(self, root: Path) -> None:
        self.settings: Any = StubSettings(root)
        self.identity_cache = IdentityCache(cast(Any, None))
        self.context: Any = StubContext()
        self.providers = Providers((), Problems(), Tasks())
        self.tenants: Any = StubTenants()
        self.networks: Any = StubNetworks()
        self.instances: Any = StubInstances()
        self.stats: Any = StubStats()
        self.events: Any = StubEvents()
        self.isolation = IsolationWatch(*cast(Any, (None, None, None, None)))

    def kill(self) -> None:
        """Ends what still runs."""
        for each in self.instances.processes_of.values():
            with contextlib.suppress(ProcessLookupError, AttributeError):
                os.kill(each.process.pid, signal.SIGKILL)
