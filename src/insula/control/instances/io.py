"""`InstanceIo`: attach, logs, exec, files and explanations of instances that run on this host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from signal import SIGKILL
from typing import Any, TypeVar

from insula.control.instances.attach_session import AttachSession, in_reader
from insula.control.instances.attach_session import follow as follow_log
from insula.control.instances.checks import check_running, no_instance, not_running
from insula.control.instances.controller import InstanceController
from insula.control.instances.drivers.base import Driver, Log, LogRecord, require
from insula.control.instances.explain import explain
from insula.control.instances.files import Files
from insula.control.instances.managed import READY, ManagedInstance
from insula.control.instances.remote import elsewhere
from insula.control.instances.specs import cli_command
from insula.control.instances.viewing import Viewer, Viewers
from insula.control.keys import INSTANCES
from insula.control.tasks import Tasks
from insula.control.tenants import Tenants
from insula.model import rules
from insula.model.errors import Conflict, Denied, Failed, Invalid, NotFound, Unavailable
from insula.model.guests import GuestReport
from insula.model.objects import Exit
from insula.model.stream import encode
from insula.model.units import check_label, parse_signal
from insula.model.views import ExecSpec, Explanation, ProcessView

T = TypeVar("T")
_PATIENCE = 10.0  # seconds that the first pass over an instance may take after the start of the daemon
_REMEMBERED = 100  # exits of exec processes that are kept for each instance


class InstanceIo:
    """Verbs on running instances. A verb that changes something runs to its end even if the client disconnects
    (`_whole`)."""

    def __init__(self, tenants: Tenants, controller: InstanceController, tasks: Tasks) -> None:
        self.context = controller.context
        self.tenants = tenants
        self.controller = controller
        self.managed = controller.managed
        self._viewers = Viewers()
        self.files = Files(controller.lifecycle.ports, self.context, self.managed)
        self._tasks = tasks

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(self._tasks.spawn(work))

    def _driver(self, managed: ManagedInstance) -> Driver:
        return self.context.driver(managed.instance)

    async def find(self, tenant: str, name: str) -> ManagedInstance:
        """The instance. NotFound; Failed if its record is damaged; Unavailable if it is on another host, or if the
        daemon has just started and has not reconciled it yet."""
        check_label("tenant", tenant)
        if managed := self.managed.find(tenant, check_label("instance", name)):
            await self._looked_at(managed)
            return managed
        await self.tenants.find(tenant)
        if entry := await self.context.store.get(INSTANCES.key(tenant, name)):
            if entry.key in self.context.unreadable:
                hint = f"restore the state, or {cli_command(tenant, f'rm -f {name}')} removes it with all that it has"
                raise Failed(f"the record of instance {name} is damaged", hint)
            if (instance := INSTANCES.decode(entry)).host != self.context.host:
                raise elsewhere(instance)
            raise Unavailable(f"instance {name} can't be served", "`insula status` tells why")
        raise no_instance(tenant, name)

    async def _looked_at(self, managed: ManagedInstance) -> None:
        if not managed.reconciled.is_set():
            try:
                async with asyncio.timeout(_PATIENCE):
                    await managed.reconciled.wait()
            except TimeoutError:
                what = f"insulad has just started, and is still looking at instance {managed.instance.name}"
                raise Unavailable(what, "try again in half a minute; `insula status` tells what is wrong") from None

    async def _started(self, tenant: str, name: str) -> ManagedInstance:
        """The instance, after its start if it is just starting: output may arrive before its status is "running"."""
        managed = await self.find(tenant, name)
        if managed.status.state == "starting":
            async with managed.lock:
                pass
        return managed

    # -- input and output ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def attach(
        self, tenant: str, name: str, *, stdin: bool = False, replay: bool = False, start: bool = False
    ) -> AsyncIterator[AttachSession]:
        """The streams of an instance from now on; with `replay` from its last start. If it was never started, or if the
        caller will start it (`start`), they begin at its start.

        Conflict if it has ended, and neither is so; Denied for `stdin` if it was made without.
        """
        managed = await self._started(tenant, name)
        driver = require(self._driver(managed), "attach")
        if managed.status.state == "paused":
            check_running(managed)
        coming = managed.status.state == "created" or (start and not managed.active)
        if not (coming or managed.active or replay):
            raise not_running(managed)
        if stdin and not managed.instance.spec.stdin:
            raise Denied(f"instance {name} has no open standard input", "make it with --interactive")
        replay = replay and not coming
        attachment = self._attachment(managed, driver, stdin=stdin, replay=replay)
        if coming:
            managed.waiting.add(attachment)
        async with self._attached(managed, attachment):
            if not coming:
                await attachment.connect(end_of(managed), fresh=False)
            yield attachment

    def _attachment(
        self, managed: ManagedInstance, driver: Driver, *, stdin: bool, replay: bool = False
    ) -> AttachSession:
        since = managed.status.started if replay else time.time()
        return AttachSession(
            driver,
            managed.instance.id,
            stdin=stdin,
            replay=replay,
            log=lambda: self._reader(managed, since=since),
            after=managed.vanished if managed.instance.spec.remove else None,
        )

    @asynccontextmanager
    async def _attached(self, managed: ManagedInstance, attachment: AttachSession) -> AsyncIterator[AttachSession]:
        """The attachment, which is closed afterwards."""
        try:
            yield attachment
        finally:
            managed.waiting.discard(attachment)
            attachment.close()

    async def logs(
        self,
        tenant: str,
        name: str,
        *,
        follow: bool = False,
        tail: int | None = None,
        since: float | None = None,
    ) -> AsyncIterator[bytes]:
        """The instance's output, as frames (`insula.model.stream`) whose payload begins with the time: eight bytes,
        nanoseconds since the epoch.

        `follow` goes on until the instance has ended and won't be started again by its restart policy or by `restart`.
        """
        managed = await self.find(tenant, name)
        if since is not None and not 0 <= since <= rules.MAX_TIME:
            raise Invalid(f"{since} is not a time", "use seconds since 1970")
        with self._reader(managed, since=since, tail=tail) as reader:
            yield b""  # the answer begins now, and not with the first output, which may never come
            async for records in follow_log(reader, lambda: not follow or has_ended(managed)):
                yield await in_reader(partial(encode_records, records))

    def _reader(self, managed: ManagedInstance, *, since: float | None = None, tail: int | None = None) -> Log:
        return self._driver(managed).log(managed.instance.id, since=since or 0.0, tail=tail)

    # -- exec ------------------------------------------------------------------------------------------------------

    async def exec_create(self, tenant: str, name: str, spec: ExecSpec, *, detach: bool = False) -> str:
        """Start one more process in the instance and return its id. With `detach` it has no input, and its output is
        dropped. Invalid; Conflict if the instance doesn't run."""
        managed = await self._started(tenant, name)
        driver = require(self._driver(managed), "exec")
        await managed.until_ready(READY)
        check_running(managed)
        prepared = await driver.prepare_exec(managed.tenant, managed.instance, spec)
        stdin = spec.stdin and not detach
        exec_id = await self._whole(driver.exec(managed.instance.id, prepared, stdin=stdin, detach=detach))
        for ended in [other for other, end in managed.execs.items() if end.done()][:-_REMEMBERED]:
            del managed.execs[ended]
        managed.execs[exec_id] = self._tasks.spawn(self._exec_end(managed, exec_id))
        return exec_id

    async def _exec_end(self, managed: ManagedInstance, exec_id: str) -> Exit:
        driver = self._driver(managed)
        try:
            ended = await driver.wait(managed.instance.id, exec_id)
        except NotFound:  # the instance has ended, and with it all of its processes
            return Exit(exit_status=128 + SIGKILL, signal=int(SIGKILL), finished=time.time())
        driver.forget_exec(managed.instance.id, exec_id)
        return ended

    @asynccontextmanager
    async def exec_attach(
        self, tenant: str, name: str, exec_id: str, *, stdin: bool = False
    ) -> AsyncIterator[AttachSession]:
        """The streams of an exec process, from its start."""
        managed = await self.find(tenant, name)
        attachment = AttachSession(self._driver(managed), managed.instance.id, exec_id, stdin=stdin)
        try:
            await attachment.connect(_exec_of(managed, exec_id), fresh=True)
            yield attachment
        finally:
            attachment.close()

    async def exec_wait(self, tenant: str, name: str, exec_id: str) -> Exit:
        """Wait until an exec process has ended, and return its exit."""
        return await asyncio.shield(_exec_of(await self.find(tenant, name), exec_id))

    async def exec_kill(self, tenant: str, name: str, exec_id: str, signal: int) -> None:
        """Send a signal to an exec process. Conflict if it has ended."""
        managed = await self.find(tenant, name)
        try:
            self._driver(managed).signal(managed.instance.id, parse_signal(str(signal)), exec_id)
        except NotFound:
            raise Conflict("that process has ended") from None

    async def screenshot(self, tenant: str, name: str) -> bytes:
        """A picture of the screen, a PNG. Unavailable if it has none; Conflict if it doesn't run."""
        managed = await self._started(tenant, name)
        driver = require(self._driver(managed), "screenshot")
        check_running(managed)
        return await driver.screenshot(managed.instance.id)

    async def guest_report(self, tenant: str, name: str) -> GuestReport:
        """What the system in a machine of a disk image says of itself. Conflict if it is none, or doesn't run."""
        managed = await self._started(tenant, name)
        driver = require(self._driver(managed), "guest-report")
        check_running(managed)
        return await driver.guest_report(managed.instance.id)

    @asynccontextmanager
    async def vnc(self, tenant: str, name: str) -> AsyncIterator[Viewer]:
        """A viewer of the screen. Conflict if it has none, does not run, or has too many viewers."""
        managed = await self._started(tenant, name)
        driver = require(self._driver(managed), "vnc")
        check_running(managed)
        async with self._viewers.viewer(managed, driver) as viewer:
            yield viewer

    # -- processes, explanations, files ----------------------------------------------------------------------------

    async def processes(self, tenant: str, name: str) -> Sequence[ProcessView]:
        """The instance's processes, with their PIDs inside and on the host."""
        managed = await self.find(tenant, name)
        driver = require(self._driver(managed), "processes")
        if not managed.active:
            raise not_running(managed)
        return await self.context.surveys.do(tenant, partial(driver.processes, managed.tenant, managed.instance.id))

    async def explain(self, tenant: str, name: str) -> Explanation:
        """The isolation of the instance, read back from the kernel."""
        return await explain(self.context, self.managed, await self.find(tenant, name))

    async def archive_get(self, tenant: str, name: str, path: str) -> AsyncIterator[bytes]:
        """The file or tree at `path` in the instance, as the pieces of a tar."""
        async for piece in self.files.get(await self.find(tenant, name), path):
            yield piece

    async def archive_put(
        self, tenant: str, name: str, path: str, pieces: AsyncIterator[bytes], copy: str | None = None
    ) -> None:
        """Unpack a tar into the directory `path` in the instance; for `copy` see `Files.put`."""
        await self.files.put(await self.find(tenant, name), path, pieces, copy)

    async def export(self, tenant: str, name: str) -> AsyncIterator[bytes]:
        """The root file system, as the pieces of a tar."""
        async for piece in self.files.export(await self.find(tenant, name)):
            yield piece


def has_ended(managed: ManagedInstance) -> bool:
    """Whether it has ended, and neither its restart policy nor a verb will start it again."""
    return managed.gone or not (managed.active or managed.busy or managed.restarting)


def encode_records(records: Sequence[LogRecord]) -> bytes:
    return b"".join(encode(record.kind, record.time_ns.to_bytes(8, "big") + record.data) for record in records)


def end_of(managed: ManagedInstance) -> asyncio.Future[Exit]:
    """The exit of its current or last start."""
    if not managed.ended.done() and managed.status.state == "exited" and managed.status.exit:
        managed.ended.set_result(managed.status.exit)
    return managed.ended


def _exec_of(managed: ManagedInstance, exec_id: str) -> asyncio.Task[Exit]:
    if ended := managed.execs.get(exec_id):
        return ended
    raise NotFound(f"instance {managed.instance.name} has no such process", "it ended long ago")
