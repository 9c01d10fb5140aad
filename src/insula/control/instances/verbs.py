"""Instances: the verbs. Each commits what is wanted, then acts at once; reconcile.py finishes it after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from insula.control.instances import limits, renaming
from insula.control.instances.admission import Admission
from insula.control.instances.attachment import Attachment, in_reader
from insula.control.instances.attachment import follow as follow_log
from insula.control.instances.damaged import Damaged
from insula.control.instances.drivers.base import Log, LogRecord
from insula.control.instances.explain import explain
from insula.control.instances.files import Files
from insula.control.instances.limits import check_running, not_running
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.sharing import partner
from insula.control.instances.specs import typed
from insula.control.instances.supervisor import Supervisor
from insula.control.keys import INSTANCES
from insula.control.tenants import Tenants
from insula.model.errors import Conflict, Denied, Failed, InsulaError, Invalid, NotFound, Unavailable
from insula.model.objects import ConsoleSize, Exit, InstanceSpec, InstanceStatus, Tenant
from insula.model.stream import encode
from insula.model.units import check_label, parse_signal
from insula.model.views import ExecSpec, Explanation, InstanceView, ProcessView, ResourcesPatch

T = TypeVar("T")
_SIGKILL = 9
_PATIENCE = 10.0  # seconds for an instance to be looked at, after the start of the daemon
_REMEMBERED = 100  # ends of other processes in an instance


class Instances:
    """What a verb begins it ends, even if the client goes away meanwhile (`_whole`)."""

    def __init__(self, tenants: Tenants, admission: Admission, supervisor: Supervisor) -> None:
        self.context = supervisor.context
        self.tenants = tenants
        self.admission = admission
        self.supervisor = supervisor
        self.files = Files(supervisor)
        self.damaged = Damaged(supervisor)

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        result: T = await asyncio.shield(self.supervisor.spawn(work))
        return result

    # -- looking ---------------------------------------------------------------------------------------------------

    async def find(self, tenant: str, name: str) -> ManagedInstance:
        """The instance, or NotFound. Unavailable if the daemon has just started and has not looked at it yet."""
        check_label("tenant", tenant)
        if member := self.supervisor.find(tenant, check_label("instance", name)):
            await self._looked_at(member)
            return member
        await self.tenants.find(tenant)
        if entry := await self.context.store.get(INSTANCES.key(tenant, name)):
            if (tenant, name) in self.damaged.names(tenant):
                hint = f"restore the state, or {typed(tenant, f'rm -f {name}')} removes it with all that it has"
                raise Failed(f"the record of instance {name} is damaged", hint)
            INSTANCES.decode(entry)  # Failed
            raise Unavailable(f"instance {name} can't be served", "`insula status` tells why")
        raise NotFound(f"tenant {tenant} has no instance {name}", f"{typed(tenant, 'ps -a')} lists them")

    async def _looked_at(self, member: ManagedInstance) -> None:
        if not member.reconciled.is_set():
            try:
                async with asyncio.timeout(_PATIENCE):
                    await member.reconciled.wait()
            except TimeoutError:
                what = f"insulad has just started, and is still looking at instance {member.instance.name}"
                raise Unavailable(what, "try again in half a minute; `insula status` tells what is wrong") from None

    async def _started(self, tenant: str, name: str) -> ManagedInstance:
        """The instance, not in the middle of its start: somebody may see its first output before we know it runs."""
        member = await self.find(tenant, name)
        if member.status.state == "starting":
            async with member.lock:
                pass
        return member

    async def get(self, tenant: str, name: str) -> InstanceView:
        return view(await self.find(tenant, name))

    async def list(self, tenant: str | None = None) -> list[InstanceView]:
        """The tenant's instances, or those of all for None."""
        if tenant is not None:
            await self.tenants.find(tenant)
        views = [view(member) for member in self.supervisor.of(tenant)]
        return [*views, *self.damaged.views(tenant)] if self.context.unreadable else views

    # -- living ----------------------------------------------------------------------------------------------------

    async def run(self, tenant: str, spec: InstanceSpec, *, start: bool = True) -> InstanceView:
        """A new instance, running unless `start` is False.

        On an error there is none, but for one of its start: then it is there as "failed", unless it is removed when it
        ends.
        """
        return await self._whole(self._run(tenant, spec, start))

    async def _run(self, tenant: str, spec: InstanceSpec, start: bool) -> InstanceView:
        if start and spec.options.pid_of:
            await self.tenants.find(tenant)
            partner(self.supervisor, tenant, spec)  # a wrong name leaves no instance that failed
        admitted = await self.admission.admit(tenant, spec, start=start)
        status = InstanceStatus(state="created", starts=admitted.instance.starts)
        member = ManagedInstance(admitted.tenant, admitted.instance, status, admitted.revision)
        async with member.lock:
            self.supervisor.add(member)
            if start:
                try:
                    await self.supervisor.launch(member)
                except BaseException as error:
                    if spec.remove or not isinstance(error, InsulaError):
                        with contextlib.suppress(InsulaError):  # then the next start of the daemon removes it
                            await self.supervisor.remove(member)
                    raise
        return view(member)

    async def start(self, tenant: str, name: str, console: ConsoleSize | None = None) -> InstanceView:
        """Running afterwards; one that runs already is left alone. `console` is the size of its terminal."""
        return await self._whole(self._start(await self.find(tenant, name), console))

    async def _start(self, member: ManagedInstance, console: ConsoleSize | None) -> InstanceView:
        async with member.lock:
            check_there(member)
            if member.status.state == "paused":
                check_running(member)
            if not member.active:
                member.cancel_restart()
                starts = member.instance.starts + 1
                await self.supervisor.want(member, wanted="running", starts=starts)
                try:
                    await self.supervisor.launch(member, console)
                except InsulaError:
                    if member.instance.spec.remove:
                        await self.supervisor.remove(member)
                    raise
        return view(member)

    async def stop(self, tenant: str, name: str, timeout: float | None = None) -> InstanceView:
        """Its stop signal, then SIGKILL after `timeout` seconds (None: the spec's); stopped afterwards."""
        return await self._whole(self._stop(await self.find(tenant, name), timeout))

    async def _stop(self, member: ManagedInstance, timeout: float | None) -> InstanceView:
        async with member.lock:
            check_there(member)
            await self.supervisor.want(member, wanted="stopped")
            await self._end(member, timeout)
        return view(member)

    async def _end(self, member: ManagedInstance, timeout: float | None) -> None:
        default = member.instance.spec.stop_timeout
        await self.supervisor.end(member, stop_signal(member), default if timeout is None else timeout)

    async def restart(self, tenant: str, name: str, timeout: float | None = None) -> InstanceView:
        """Stopped as by `stop` if it runs, then started."""
        return await self._whole(self._restart(await self.find(tenant, name), timeout))

    async def _restart(self, member: ManagedInstance, timeout: float | None) -> InstanceView:
        async with member.lock:
            check_there(member)
            if member.instance.spec.remove and member.active:
                raise Conflict(f"instance {member.instance.name} is removed when it ends", "it can't be restarted")
            # wanted as "running" in a later start: whoever finds the old one after a crash does the rest
            starts = member.instance.starts + 1
            await self.supervisor.want(member, wanted="running", starts=starts)
            await self._end(member, timeout)
            member.cancel_restart()
            await self.supervisor.launch(member)
        return view(member)

    async def kill(self, tenant: str, name: str, signal: str = "SIGKILL") -> None:
        """A signal to PID 1; Conflict if it doesn't run."""
        number = parse_signal(signal)
        member = await self._started(tenant, name)
        if member.status.state not in ("running", "paused", "stopping"):
            raise not_running(member)
        try:
            self.supervisor.driver(member).signal(member.instance.id, number)
        except NotFound:
            raise not_running(member) from None
        if member.status.state == "paused" and number in (_SIGKILL, stop_signal(member)):
            with contextlib.suppress(Conflict):  # somebody else woke it
                await self.unpause(tenant, name)  # other signals are taken when it goes on

    async def remove(self, tenant: str, name: str, *, force: bool = False) -> None:
        """Gone afterwards. Conflict while it runs, unless `force`, which kills it, and takes one whose record is
        damaged."""
        if force and (check_label("tenant", tenant), check_label("instance", name)) in self.damaged.names(tenant):
            owner = (await self.tenants.find(tenant)).value
            await self._whole(self._remove_damaged(owner, name))
            return
        member = await self.find(tenant, name)
        if member.active and not force:
            raise still_active(member)
        if member.active:  # before the lock, which a `stop` with a long timeout may hold
            await self._whole(self.supervisor.condemn(member))
        await self._whole(self._remove_locked(member, force))

    async def _remove_damaged(self, owner: Tenant, name: str) -> None:
        await self.damaged.remove(owner, name)
        if not self.context.unreadable:
            await self.admission.images.collect()

    async def _remove_locked(self, member: ManagedInstance, force: bool) -> None:
        async with member.lock:
            if member.gone:
                return
            if member.active and not force:
                raise still_active(member)
            await self.supervisor.remove(member)

    async def pause(self, tenant: str, name: str) -> InstanceView:
        """All of its processes frozen, until `unpause`. Conflict unless it runs."""
        return await self._whole(self._locked(await self._started(tenant, name), limits.pause))

    async def unpause(self, tenant: str, name: str) -> InstanceView:
        """They go on. Conflict unless it is paused."""
        return await self._whole(self._locked(await self._started(tenant, name), limits.unpause))

    async def rename(self, tenant: str, name: str, to: str) -> InstanceView:
        """The instance under another name. Invalid, Conflict: then nothing was changed."""
        act = partial(renaming.rename, name=to)
        return await self._whole(self._locked(await self.find(tenant, name), act))

    async def update(self, tenant: str, name: str, patch: ResourcesPatch) -> InstanceView:
        """Other limits, in force at once if it runs. Invalid, QuotaExceeded, Failed: then nothing was changed."""
        act = partial(limits.update, patch=patch)
        return await self._whole(self._locked(await self.find(tenant, name), act))

    async def _locked(
        self, member: ManagedInstance, act: Callable[[Supervisor, ManagedInstance], Awaitable[None]]
    ) -> InstanceView:
        async with member.lock:
            check_there(member)
            await act(self.supervisor, member)
        return view(member)

    async def finish_stop(self, member: ManagedInstance) -> None:
        """Ends a stop that was interrupted."""
        async with member.lock:
            if not member.gone and member.instance.wanted == "stopped":
                await self._end(member, None)

    async def wait(self, tenant: str, name: str) -> Exit:
        """How PID 1 ended, once it has; also of one that was removed when it ended."""
        try:
            member = await self.find(tenant, name)
        except NotFound:
            if ended := self.supervisor.last_exit(tenant, name):
                return ended
            raise
        if member.status.state == "exited" and member.status.exit:
            return member.status.exit
        if member.status.state == "failed":
            raise Failed(member.status.error or f"instance {name} did not start", member.status.hint)
        return await asyncio.shield(member.ended)

    # -- input and output ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def attach(
        self, tenant: str, name: str, *, stdin: bool = False, replay: bool = False, start: bool = False
    ) -> AsyncIterator[Attachment]:
        """Its streams from now on; with `replay` from its last start. One that was never started, or that the caller
        will `start`, is waited for.

        Conflict if it has ended and nothing of that holds; Denied for `stdin` of one that was made without.
        """
        member = await self._started(tenant, name)
        if member.status.state == "paused":
            check_running(member)
        coming = member.status.state == "created" or (start and not member.active)
        if not (coming or member.active or replay):
            raise not_running(member)
        if stdin and not member.instance.spec.stdin:
            raise Denied(f"instance {name} has no open standard input", "make it with --interactive")
        replay = replay and not coming
        since = member.status.started if replay else time.time()
        attachment = Attachment(
            self.supervisor.driver(member),
            member.instance.id,
            stdin=stdin,
            replay=replay,
            log=lambda: self._reader(member, since=since),
            after=member.vanished if member.instance.spec.remove else None,
        )
        try:
            if coming:
                member.waiting.add(attachment)
            else:
                await attachment.connect(end_of(member), fresh=False)
            yield attachment
        finally:
            member.waiting.discard(attachment)
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
        """What it printed, as frames (`insula.model.stream`) whose payload begins with eight bytes of nanoseconds.

        `follow` goes on until the instance has ended and won't be started again by its restart policy or by `restart`.
        """
        member = await self.find(tenant, name)
        if since is not None and not 0 <= since <= 1e10:
            raise Invalid(f"{since} is no time", "use seconds since 1970")
        with self._reader(member, since=since, tail=tail) as reader:
            async for records in follow_log(reader, lambda: not follow or has_ended(member)):
                yield await in_reader(partial(encode_records, records))

    def _reader(self, member: ManagedInstance, *, since: float | None = None, tail: int | None = None) -> Log:
        return self.supervisor.driver(member).log(member.instance.id, since=since or 0.0, tail=tail)

    # -- more processes --------------------------------------------------------------------------------------------

    async def exec_create(self, tenant: str, name: str, spec: ExecSpec, *, detach: bool = False) -> str:
        """Runs one more process inside; its id, once it has started. With `detach` it has no input, and its output is
        read and dropped. Conflict if the instance doesn't run."""
        member = await self._started(tenant, name)
        check_running(member)
        driver = self.supervisor.driver(member)
        prepared = await driver.prepare_exec(member.tenant, member.instance, spec)
        stdin = spec.stdin and not detach
        exec_id = await self._whole(driver.exec(member.instance.id, prepared, stdin=stdin, detach=detach))
        for ended in [other for other, end in member.execs.items() if end.done()][:-_REMEMBERED]:
            del member.execs[ended]
        member.execs[exec_id] = self.supervisor.spawn(self._exec_end(member, exec_id))
        return exec_id

    async def _exec_end(self, member: ManagedInstance, exec_id: str) -> Exit:
        driver = self.supervisor.driver(member)
        try:
            ended = await driver.wait(member.instance.id, exec_id)
        except NotFound:  # the instance ended, and all that ran inside with it
            return Exit(exit_status=128 + _SIGKILL, signal=_SIGKILL, finished=time.time())
        driver.forget_exec(member.instance.id, exec_id)
        return ended

    @asynccontextmanager
    async def exec_attach(
        self, tenant: str, name: str, exec_id: str, *, stdin: bool = False
    ) -> AsyncIterator[Attachment]:
        """The streams of that process, from its beginning."""
        member = await self.find(tenant, name)
        attachment = Attachment(self.supervisor.driver(member), member.instance.id, exec_id, stdin=stdin)
        try:
            await attachment.connect(_exec_of(member, exec_id), fresh=True)
            yield attachment
        finally:
            attachment.close()

    async def exec_wait(self, tenant: str, name: str, exec_id: str) -> Exit:
        """How that process ended, once it has."""
        return await asyncio.shield(_exec_of(await self.find(tenant, name), exec_id))

    async def exec_kill(self, tenant: str, name: str, exec_id: str, signal: int) -> None:
        """A signal to that process; Conflict if it has ended."""
        member = await self.find(tenant, name)
        try:
            self.supervisor.driver(member).signal(member.instance.id, parse_signal(str(signal)), exec_id)
        except NotFound:
            raise Conflict("that process has ended") from None

    # -- looking inside --------------------------------------------------------------------------------------------

    async def processes(self, tenant: str, name: str) -> Sequence[ProcessView]:
        """Everything that runs in it, with the numbers inside and on the host."""
        member = await self.find(tenant, name)
        if not member.active:
            raise not_running(member)
        driver = self.supervisor.driver(member)
        return await self.context.surveys.do(tenant, partial(driver.processes, member.tenant, member.instance.id))

    async def explain(self, tenant: str, name: str) -> Explanation:
        """What makes it isolated, read from the kernel."""
        return await explain(self.supervisor, await self.find(tenant, name))

    async def archive_get(self, tenant: str, name: str, path: str) -> AsyncIterator[bytes]:
        """The file or tree at `path` inside, as a tar in pieces."""
        async for piece in self.files.get(await self.find(tenant, name), path):
            yield piece

    async def archive_put(
        self, tenant: str, name: str, path: str, pieces: AsyncIterator[bytes], copy: str | None = None
    ) -> None:
        """Unpacks a tar into the directory `path` inside, or where `copy` says (see `Archives.put`)."""
        await self.files.put(await self.find(tenant, name), path, pieces, copy)

    async def export(self, tenant: str, name: str) -> AsyncIterator[bytes]:
        """The root file system as a tar in pieces."""
        async for piece in self.files.export(await self.find(tenant, name)):
            yield piece


def view(member: ManagedInstance) -> InstanceView:
    waiting = not member.active and member.restarting is not None and not member.restarting.done()
    health = member.monitor.health if member.monitor else None
    return InstanceView(
        instance=member.instance,
        status=member.status,
        restarting=waiting,
        health=health,
        reconciled=member.reconciled.is_set(),
    )


def has_ended(member: ManagedInstance) -> bool:
    """Whether it doesn't run and is not about to, by its restart policy or a verb at work. What follows from an end is
    decided by the task that watches it."""
    if member.gone:
        return True
    busy = member.lock.locked() or any(t is not None and not t.done() for t in (member.watching, member.restarting))
    return not (member.active or busy)


def encode_records(records: Sequence[LogRecord]) -> bytes:
    return b"".join(encode(record.kind, record.time_ns.to_bytes(8, "big") + record.data) for record in records)


def end_of(member: ManagedInstance) -> asyncio.Future[Exit]:
    """The end of its current or last start."""
    if not member.ended.done() and member.status.state == "exited" and member.status.exit:
        member.ended.set_result(member.status.exit)
    return member.ended


def _exec_of(member: ManagedInstance, exec_id: str) -> asyncio.Task[Exit]:
    if ended := member.execs.get(exec_id):
        return ended
    raise NotFound(f"instance {member.instance.name} has no such process", "it ended long ago")


def check_there(member: ManagedInstance) -> None:
    if member.gone or member.instance.wanted == "removed":
        there = typed(member.instance.tenant, "ps -a")
        raise NotFound(f"instance {member.instance.name} was removed", f"{there} lists what is there")


def still_active(member: ManagedInstance) -> Conflict:
    return Conflict(f"instance {member.instance.name} is {member.status.state}", "stop it first, or use --force")


def stop_signal(member: ManagedInstance) -> int:
    return parse_signal(member.instance.spec.stop_signal or member.instance.config.stop_signal or "SIGTERM")
