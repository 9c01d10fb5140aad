"""What every instance does right now: launches, exits, restarts, and those who wait for them.

A `ManagedInstance` is one instance in memory: what is wanted (as the store has it) and what was measured. Verbs take
the member's lock, commit what is wanted, and then act. A task for each running instance waits for its end and tidies
up, without the lock, so a verb that wants the old process gone waits for that task. A status is kept in memory and
written to the store when it settles, behind the caller's back. Only before an instance is discarded its end must be
stored, because what is discarded is the other place that knows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from insula.control.context import Context
from insula.control.instances.admission import dismiss
from insula.control.instances.drivers.base import CreateOptions, Driver, Running
from insula.control.instances.health import HealthChecks
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.memory import MemoryEvents
from insula.control.instances.recorder import Recorder
from insula.control.instances.restart_policy import STEADY, after_exit, delay
from insula.control.instances.sharing import guests, partner
from insula.control.keys import INSTANCES, STATUS
from insula.control.networks.ports import Ports
from insula.model.errors import Conflict, Failed, InsulaError, NotFound, Unavailable
from insula.model.objects import ConsoleSize, Exit, Instance, InstanceStatus, Tenant
from insula.store.protocol import TransactionConflict

log = logging.getLogger("insula.control")
SETTLED = ("running", "paused", "exited", "failed")
_SIGKILL = 9
_REMEMBERED = 1000
_ATTEMPTS = 20
_USUAL, _DYING = 1.0, 60.0  # seconds for a process to die of SIGKILL
_RETRY = 1.0  # seconds between attempts at what must succeed in the end


class Supervisor:
    def __init__(self, context: Context, ports: Ports) -> None:
        self.context = context
        self.ports = ports
        self.recorder = Recorder(context.store)
        self.health = HealthChecks(context.driver, self.recorder, self.spawn)
        self.memory = MemoryEvents(self.recorder)
        self.members: dict[tuple[str, str], ManagedInstance] = {}
        self.stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._last: dict[tuple[str, str], Exit] = {}  # of instances that were removed when they ended

    # -- members ---------------------------------------------------------------------------------------------------

    def add(self, member: ManagedInstance) -> None:
        self.members[member.key] = member
        self.driver(member).make_room(len(self.members))

    def driver(self, member: ManagedInstance) -> Driver:
        return self.context.driver(member.instance)

    def find(self, tenant: str, name: str) -> ManagedInstance | None:
        return self.members.get((tenant, name))

    def of(self, tenant: str | None) -> Iterator[ManagedInstance]:
        return (m for _, m in sorted(self.members.items()) if tenant is None or m.instance.tenant == tenant)

    def last_exit(self, tenant: str, name: str) -> Exit | None:
        return self._last.get((tenant, name))

    async def want(self, member: ManagedInstance, **changes: Any) -> None:
        """Commits what is wanted. The lock is held. Raises Conflict if somebody else changed it."""
        before = member.instance
        instance: Instance = msgspec.structs.replace(before, generation=before.generation + 1, **changes)
        try:
            put = INSTANCES.put(instance, *member.key)
            member.revision = await self.context.store.put(put.key, put.value, expect=member.revision)
        except TransactionConflict:
            raise Conflict(f"instance {instance.name} was changed at the same time", "try again") from None
        member.instance = instance

    # -- starting --------------------------------------------------------------------------------------------------

    async def launch(self, member: ManagedInstance, console: ConsoleSize | None = None) -> None:
        """Starts it, as wanted. The lock is held and nothing of it runs. Raises InsulaError and leaves nothing."""
        if member.instance.wanted == "removed":
            raise NotFound(f"instance {member.instance.name} is being removed", "run another one")
        if self.stopping:
            raise Unavailable("Insula is going down on this host", "start insulad again, and then this")
        await member.settled()
        if member.ended.done():
            member.ended = asyncio.get_running_loop().create_future()
        starts, before = member.instance.starts, member.status
        again = before if before.starts == starts else InstanceStatus(state="created")
        starting = InstanceStatus(state="starting", starts=starts, restarts=again.restarts, backoff=again.backoff)
        self._set(member, starting)
        member.tidy = False
        try:
            running = await self._launch(member, console)
        except InsulaError as error:
            self._failed(member, error)
            raise
        except BaseException:
            self._failed(member, Failed("its start was given up", "start it again"))
            raise
        self.note(
            member,
            state="running",
            pid=running.pid,
            start_time=running.start_time,
            started=running.started or time.time(),
            resources=member.instance.spec.resources,
        )
        self.context.problems.solved(records_of(member))
        self._watch(member)

    async def _launch(self, member: ManagedInstance, console: ConsoleSize | None) -> Running:
        """Create it, plug it in, connect those who wait for its output, and start it. InsulaError; then nothing of it
        is left."""
        tenant, instance, driver = member.tenant, member.instance, self.driver(member)
        joined, network = partner(self, instance.tenant, instance.spec), await self.ports.network(instance)
        await self.context.prepared(tenant.name)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self.discard, member)
            try:
                await driver.create(tenant, instance, CreateOptions(network, console, joined))
                if network:
                    await self.ports.plug(tenant, network, instance, driver.nic(instance.id))
                for attachment in member.waiting.copy():
                    await attachment.connect(member.ended, fresh=True)
                member.waiting.clear()
                running = await driver.start(instance.id)
            except (InsulaError, OSError) as error:
                if failure := await driver.failure(instance.id):  # the cause; the rest follows from it
                    raise failure from None
                if isinstance(error, InsulaError):
                    raise
                log.warning("instance %s/%s: its start failed", *member.key, exc_info=error)
                what = f"instance {instance.name} can't be started: {error.strerror or error}"
                raise Failed(what, "look at the disk below the root directory, and at insulad's log") from error
            undo.pop_all()
        return running

    async def discard(self, member: ManagedInstance) -> None:
        """Kill what runs of it, and remove it from the host with its port and name, but for its directory."""
        await self.driver(member).discard(member.instance)
        await self.ports.unplug(member.tenant, member.instance)

    async def update_names(self, tenant: Tenant) -> None:
        """Have the names of the tenant's instances that run resolve, and no others."""
        await self.ports.intents.apply(tenant)

    async def remove_directory(self, member: ManagedInstance) -> None:
        await self.remove_stray_directory(self.driver(member), member.instance.id)

    async def remove_stray_directory(self, driver: Driver, instance_id: str) -> None:
        """Also one of millions of files, nested however deep. What is in the way is a problem of this host."""
        name = f"directory of instance {instance_id}"
        try:
            await driver.remove_directory(instance_id)
            self.context.problems.solved(name)
        except (InsulaError, OSError) as error:
            self.context.problems[name] = str(error)

    def _failed(self, member: ManagedInstance, error: InsulaError) -> None:
        status = member.status
        self._set(member, msgspec.structs.replace(status, state="failed", error=error.message, hint=error.hint))
        for attachment in member.waiting:
            attachment.fail(error)
        member.waiting.clear()
        if not member.ended.done():
            member.ended.set_exception(error)
            member.ended.exception()  # nobody need be waiting

    def adopt(self, member: ManagedInstance, status: InstanceStatus) -> None:
        """It runs already: this is how."""
        if status != member.status:  # else it is stored as it is
            self._set(member, status)
        self._watch(member, adopted=True)

    def note(self, member: ManagedInstance, **measured: Any) -> None:
        """What was found out about it while it runs."""
        self._set(member, msgspec.structs.replace(member.status, **measured))

    # -- ending ----------------------------------------------------------------------------------------------------

    def _watch(self, member: ManagedInstance, *, adopted: bool = False) -> None:
        member.watching = self.spawn(self._until_end(member))
        self.health.begin(member, adopted=adopted)
        self.memory.begin(member, self.driver(member), adopted=adopted)

    async def _until_end(self, member: ManagedInstance) -> None:
        """Waits for the end of PID 1, tells it, stores it, tidies up, and has it restarted if that is wanted."""
        await self.conclude(member, await self._end_of(member))

    async def _end_of(self, member: ManagedInstance) -> Exit:
        """How PID 1 ended, once it has. Whatever is in the way, such as a full /run, is told, and it is asked again."""
        name = f"end of instance {'/'.join(member.key)}"
        while True:
            try:
                ended = await self.driver(member).wait(member.instance.id)
            except NotFound:
                ended = Exit(exit_status=None, finished=time.time())
            except Exception as error:
                self.context.problems.report(name, error)
                await asyncio.sleep(_RETRY)
                continue
            self.context.problems.solved(name)
            return ended

    async def conclude(self, member: ManagedInstance, ended: Exit, *, restart: bool = True) -> None:
        """What follows from an end: status, waiters, tidying up, policy (unless it was the host's end, `restart`)."""
        self.health.end(member)
        self.memory.end(member)
        started = member.status.started
        backoff = 0 if started and ended.finished - started >= STEADY else member.status.backoff
        self._set(
            member,
            msgspec.structs.replace(
                member.status,
                state="exited",
                pid=None,
                start_time=None,
                exit=ended,
                backoff=backoff,
                resources=None,
            ),
        )
        if not member.ended.done():
            member.ended.set_result(ended)
        await self.saved(member)
        await self.driver(member).flushed(member.instance.id)  # its log is in the directory that may go now
        await self._tidy(member)
        self.resume(member, restart=restart)

    def resume(self, member: ManagedInstance, *, restart: bool = True) -> None:
        """Has an instance that ended removed or started again, if that is wanted."""
        instance, ended = member.instance, member.status.exit
        if self.stopping:
            member.vanished.set()
        if self.stopping or ended is None:
            return
        if instance.spec.remove or instance.wanted == "removed":  # the latter if who removes it gave up waiting
            self.spawn(self._remove_ended(member))
        elif not restart or instance.wanted != "running":
            return
        elif after_exit(instance.spec.restart, ended, member.status.restarts):
            member.restarting = self.spawn(self._restart(member, instance.starts))

    def retry(self, member: ManagedInstance) -> None:
        """Has one that did not start tried again, if its policy is so."""
        failure = Exit(exit_status=None, finished=time.time())
        if after_exit(member.instance.spec.restart, failure, member.status.restarts):
            member.restarting = self.spawn(self._restart(member, member.instance.starts))

    async def _restart(self, member: ManagedInstance, starts: int) -> None:
        """Starts it again after a pause, unless the user wants something else by then."""
        await asyncio.sleep(delay(member.status.backoff))
        async with member.lock:
            if member.gone or member.instance.wanted != "running" or member.instance.starts != starts:
                return
            if member.active or self.stopping:
                return
            before = member.status
            member.status = msgspec.structs.replace(before, restarts=before.restarts + 1, backoff=before.backoff + 1)
            try:
                await asyncio.shield(self.spawn(self.launch(member)))
            except InsulaError as error:
                log.warning("instance %s/%s does not start again: %s", *member.key, error)
                self.retry(member)

    async def _remove_ended(self, member: ManagedInstance) -> None:
        try:
            async with member.lock:
                if not member.gone and not member.active:
                    await self._dismiss(member)
                    self.spawn(self.remove_directory(member))
        finally:
            member.vanished.set()

    async def _tidy(self, member: ManagedInstance) -> None:
        """Removes container and port; again until it succeeds, or the daemon ends and the next one does it."""
        name = "/".join(member.key)
        while True:
            try:
                await self.discard(member)
                member.tidy = True
                self.context.problems.solved(f"instance {name}")
                return
            except Exception as error:
                self.context.problems[f"instance {name}"] = f"its remains can't be removed: {error!s}"
                await asyncio.sleep(_RETRY)

    async def end(self, member: ManagedInstance, signal: int, timeout: float) -> None:
        """Asks PID 1 to end, waits, kills it, and waits until it is tidied up. The lock is held. Failed if that does
        not kill it."""
        member.cancel_restart()
        paused = member.status.state == "paused"
        if member.status.state in ("running", "paused"):
            self.note(member, state="stopping")
        if member.active:
            await self._signal(member, signal, thaw=paused)
            await asyncio.wait([member.ended], timeout=timeout)
            if not member.ended.done():
                await self._signal(member, _SIGKILL, thaw=True)
                await asyncio.wait([member.ended], timeout=_USUAL)
                if not member.ended.done() and self.driver(member).frozen_elsewhere(member.instance.id) is None:
                    await asyncio.wait([member.ended], timeout=_DYING)
            if not member.ended.done():
                raise undying(member, self.driver(member).frozen_elsewhere(member.instance.id))
        await member.settled()

    async def _signal(self, member: ManagedInstance, number: int, *, thaw: bool) -> None:
        """To PID 1, which takes no notice of it, be it SIGKILL, while it is frozen."""
        with contextlib.suppress(NotFound):
            self.driver(member).signal(member.instance.id, number)
        if thaw:
            await self.driver(member).resume(member.instance.id)
            for guest in guests(self, member):  # the kernel waits for all in a PID namespace to die with its first
                await self.driver(guest).resume(guest.instance.id)

    async def condemn(self, member: ManagedInstance) -> None:
        """Commit that it is to be removed, and only then kill it. Without the lock: who holds it waits for its end.

        Should the daemon die between the two or after them, the next one removes it.
        """
        for attempt in range(_ATTEMPTS):
            if member.gone:
                return
            try:
                if member.instance.wanted != "removed":
                    await self.want(member, wanted="removed")
                break
            except Conflict:  # who holds the lock committed something at this moment
                if attempt == _ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.01)
        with contextlib.suppress(NotFound):
            self.driver(member).signal(member.instance.id, _SIGKILL)

    async def remove(self, member: ManagedInstance) -> None:
        """Kills it, and takes it off the host and out of the store. The lock is held."""
        if member.instance.wanted != "removed":
            await self.want(member, wanted="removed")
        await self.end(member, _SIGKILL, 0.0)
        await self._dismiss(member)
        await self.remove_directory(member)

    async def _dismiss(self, member: ManagedInstance) -> None:
        """Takes what has ended out of the store. Should we die before its directory goes, the next start finds that."""
        if not member.tidy:
            await self.discard(member)
        member.gone = True  # from here on no status is stored any more
        await self.saved(member)
        try:
            await dismiss(self.context, member.instance)
        except BaseException:
            member.gone = False
            raise
        self._forget(member)

    def _forget(self, member: ManagedInstance) -> None:
        """Its end can still be asked for, for a while."""
        self.context.problems.solved(records_of(member))
        self.members.pop(member.key, None)
        member.vanished.set()
        if member.status.exit:
            self._last[member.key] = member.status.exit
            while len(self._last) > _REMEMBERED:
                self._last.pop(next(iter(self._last)))
        for attachment in member.waiting:
            attachment.fail(NotFound(f"instance {member.instance.name} was removed"))

    # -- statuses --------------------------------------------------------------------------------------------------

    def _set(self, member: ManagedInstance, status: InstanceStatus) -> None:
        member.status = status
        vanishes = status.state == "exited" and member.instance.spec.remove  # with all that is stored of it
        if status.state in SETTLED and not member.gone and not vanishes:
            member.unsaved = True
            if member.saving is None or member.saving.done():
                member.saving = self.spawn(self._save(member))

    async def _save(self, member: ManagedInstance) -> None:
        while member.unsaved and not member.gone:
            member.unsaved = False
            status = member.status
            if status.state not in SETTLED:
                continue
            try:
                await self.context.store.transact([], [STATUS.put(status, *member.key)])
            except InsulaError as error:  # a full disk: keep trying, the container keeps its record until then
                log.warning("the status of %s/%s can't be stored: %s", *member.key, error)
                member.unsaved = True
                await asyncio.sleep(_RETRY)

    async def saved(self, member: ManagedInstance) -> None:
        """Returns when no status of it is being written."""
        while member.saving and not member.saving.done():
            await asyncio.wait([member.saving])

    # -- tasks -----------------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that is kept until it ends, and whose failure is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, InsulaError):
            log.error("a task failed", exc_info=error)

    async def close(self) -> None:
        """Lets go of the instances, which keep running."""
        self.stopping = True
        for member in self.members.values():
            await self.saved(member)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.recorder.close()


def undying(member: ManagedInstance, group: str | None) -> Failed:
    """Why PID 1 is still there after SIGKILL: with version 1, somebody's frozen group (cgroups(7), freezer), or the
    kernel waits for something."""
    pid = member.status.pid
    what = f"process {pid} of instance {member.instance.name} does not die of SIGKILL"
    if group is not None:
        return Failed(f"{what}: somebody moved it into the frozen group {group}", "thaw that group")
    return Failed(what, f"`cat /proc/{pid}/stack` shows what the kernel waits for")


def records_of(member: ManagedInstance) -> str:
    """What a problem with its records is called; it is solved when it starts again, or is removed."""
    return f"records of instance {'/'.join(member.key)}"
