"""`Lifecycle`: carries out the actions that `decide` returns, on an instance of this host.

The caller holds the instance's lock. An action updates `ManagedInstance.observed`, `hold` and the status. If it raises
InsulaError or OSError, it has undone what it had begun, or the next observation finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from signal import SIGKILL
from typing import Literal

import msgspec

from insula.control.accounting.accounts import Accounts
from insula.control.context import Context
from insula.control.disk import release_project
from insula.control.instances.admission import delete_instance
from insula.control.instances.attached import attached
from insula.control.instances.checks import undying
from insula.control.instances.drivers.base import CreateOptions, Driver, Observed, Running
from insula.control.instances.drivers.directory import LaunchRecord, boot_id
from insula.control.instances.holders import holder_named
from insula.control.instances.managed import Failure, ManagedInstance, ManagedInstances
from insula.control.instances.plugging import Plugging
from insula.control.instances.recorder import Recorder
from insula.control.instances.restart_policy import STEADY, after_exit, delay
from insula.control.instances.sharing import pid_members, pid_owner
from insula.control.instances.specs import stop_signal
from insula.control.instances.statuses import Statuses, error_fields
from insula.control.instances.watches import Watches
from insula.control.keys import INSTANCES
from insula.control.networks.ports import Ports
from insula.control.tasks import Tasks, together, within_limit
from insula.model.errors import Failed, InsulaError, NotFound
from insula.model.objects import Exit, InstanceStatus
from insula.network.fabric import Nic

log = logging.getLogger("insula.control")
LIMIT = 30.0
"""Seconds after which a start is given up, and after which the removal of files is a problem."""
_USUAL, _DYING = 1.0, 60.0  # seconds that a process usually takes, and may take, to die of SIGKILL
_RETRY = 1.0  # seconds between attempts


class Lifecycle:
    """The actions. `nudge` has the controller reconcile an instance; `report_failure` has it answer waiters."""

    def __init__(
        self,
        context: Context,
        managed: ManagedInstances,
        ports: Ports,
        statuses: Statuses,
        recorder: Recorder,
        accounts: Accounts,
        tasks: Tasks,
        nudge: Callable[[ManagedInstance], None],
        report_failure: Callable[[ManagedInstance, Exception], None],
    ) -> None:
        self.context = context
        self.managed = managed
        self.ports = ports
        self.statuses = statuses
        self.watches = Watches(context.driver, recorder, tasks.spawn)
        self.accounts = accounts
        self.plugging = Plugging(context, ports, statuses, accounts)
        self.boot = boot_id()
        self._tasks = tasks
        self._nudge = nudge
        self._report_failure = report_failure

    def driver(self, managed: ManagedInstance) -> Driver:
        return self.context.driver(managed.instance)

    # -- starting --------------------------------------------------------------------------------------------------

    async def launch(self, managed: ManagedInstance, *, by_policy: bool = False) -> None:
        """Start the instance. If that fails its status is "failed", with the reason; no InsulaError is raised."""
        instance, before, asked = managed.instance, managed.status, bool(managed.waiters)
        if managed.ended.done():
            managed.ended = asyncio.get_running_loop().create_future()
        starting = InstanceStatus(
            state="starting", starts=instance.starts, observed_generation=before.observed_generation
        )
        if by_policy:
            starting = msgspec.structs.replace(starting, restarts=before.restarts + 1, backoff=before.backoff + 1)
        self.statuses.set(managed, starting)
        managed.observed = None  # until it is known how this ended
        telemetry, begun = self.context.telemetry, time.monotonic()
        try:
            running = await self._launch(managed)
            telemetry.launches.observe(time.monotonic() - begun)
        except InsulaError as error:
            self._failed(managed, error, by_policy=by_policy or not (asked or managed.waiters))
            return
        except Exception:
            self._failed(managed, Failed("its start was given up", "start it again"), by_policy=not managed.waiters)
            raise
        state: Literal["starting", "running"] = self._state(managed)
        managed.observed = Observed(state, running, LaunchRecord(starts=instance.starts, boot=self.boot))
        self.statuses.note(
            managed,
            state=state,
            observed_generation=instance.generation,
            pid=running.pid,
            start_time=running.start_time,
            started=running.started or time.time(),
            resources=instance.spec.resources,
            ports=[port.index for port in instance.plugged],
            disks=attached(instance),
        )
        self.context.problems.solved(managed.records)
        self._watch(managed)

    async def _launch(self, managed: ManagedInstance) -> Running:
        """Create it, plug in its ports, connect clients that wait for its output, and start it. After an InsulaError
        nothing of it is left."""
        instance = managed.instance
        console, managed.console = managed.console, None
        joined, places = pid_owner(self.managed, instance.tenant, instance.spec), await self.ports.places(instance)
        await self.context.prepared(instance.tenant)
        await self.driver(managed).prepare(managed.tenant, instance)  # however long it takes
        managed.hold = "unknown"
        with self._in_time(managed) as check:

            def connect(nic: Nic, port: int | None = None) -> Awaitable[None]:
                try:
                    check()
                except Failed:
                    nic.close()
                    raise
                chosen = [place for place in places if port in (None, place.port.index)]
                return self.ports.plug(managed.tenant, chosen, nic)

            options = CreateOptions([place.network for place in places], console, joined, connect if places else None)
            async with AsyncExitStack() as undo:
                undo.push_async_callback(self._discard, managed)
                running = await self._start(managed, options, check)
                undo.pop_all()
        return running

    async def _start(self, managed: ManagedInstance, options: CreateOptions, check: Callable[[], None]) -> Running:
        """The steps of `_launch`. `check` is called between them; it raises when the time for the start is over."""
        tenant, instance, driver = managed.tenant, managed.instance, self.driver(managed)
        try:
            with holder_named(self.managed, tenant.name):
                await driver.create(tenant, instance, options)
            check()
            for attachment in managed.waiting.copy():
                await attachment.connect(managed.ended, fresh=True)
            check()
            managed.waiting.clear()
            running = await driver.start(instance.id)
            check()
        except (InsulaError, OSError) as error:
            if failure := await driver.failure(instance.id):  # the cause of this error
                raise failure from None
            if isinstance(error, InsulaError):
                raise
            log.warning("instance %s/%s: its start failed", *managed.key, exc_info=error)
            what = f"instance {instance.name} can't be started: {error.strerror or error}"
            raise Failed(what, "look at the disk below the root directory, and at insulad's log") from error
        return running

    @contextmanager
    def _in_time(self, managed: ManagedInstance) -> Iterator[Callable[[], None]]:
        """Give up a start after `LIMIT` seconds. The waiters are answered at once; from then on the function that is
        yielded raises. A step of the runtime can't be interrupted safely, so the undoing begins when it has ended."""
        late: list[Failed] = []

        def give_up() -> None:
            what = f"instance {managed.instance.name} can't be started: that takes more than {LIMIT:g} s"
            late.append(Failed(what, "it is being undone; look at the load of the host, and try again"))
            self._report_failure(managed, late[0])

        def check() -> None:
            if late:
                raise late[0]

        timer = asyncio.get_running_loop().call_later(LIMIT, give_up)
        try:
            yield check
        finally:
            timer.cancel()

    def _failed(self, managed: ManagedInstance, error: InsulaError, *, by_policy: bool) -> None:
        """Record a failed start. It is final, unless the restart policy had started it, or nobody waits for it."""
        instance, status = managed.instance, managed.status
        self.context.telemetry.failed_launches += 1
        managed.observed = Observed("none", record=LaunchRecord(starts=instance.starts, boot=self.boot))
        managed.failure = Failure(instance.generation, error)
        failure, again = Exit(exit_status=None, finished=time.time()), None
        if by_policy and after_exit(instance.spec.restart, failure, status.restarts):
            again = failure.finished + delay(status.backoff)
        if by_policy:
            how = "does not start again" if status.restarts else "does not start"
            log.warning("instance %s/%s %s: %s", *managed.key, how, error)
        self.statuses.note(managed, state="failed", next_start=again, **error_fields(error))
        for attachment in managed.waiting:
            attachment.fail(error)
        managed.waiting.clear()
        if not managed.ended.done():
            managed.ended.set_exception(error)
            managed.ended.exception()  # retrieved, so that asyncio logs nothing if nobody waits

    async def start_anew(self, managed: ManagedInstance) -> None:
        """Commit another start, since the host was booted. Conflict if its record was changed meanwhile."""
        before = managed.instance
        begun = {"wanted": "running", "starts": before.starts + 1, "generation": before.generation + 1}
        instance = msgspec.structs.replace(before, **begun)
        put = INSTANCES.put(instance, *managed.key)
        managed.revision = await self.context.store.put(put.key, put.value, expect=managed.revision)
        managed.instance = instance

    # -- running ---------------------------------------------------------------------------------------------------

    async def adopt(self, managed: ManagedInstance) -> None:
        """Record the observed state as its status, and watch its first process."""
        observed = managed.observed
        if observed is None or observed.running is None:
            raise Failed("its records are missing", "look at the run directory")
        running, status, named = observed.running, managed.status, managed.active
        self.statuses.set(
            managed,
            InstanceStatus(
                state=observed.state if observed.state in ("starting", "paused") else "running",
                observed_generation=status.observed_generation,
                starts=observed.record.starts if observed.record else managed.instance.starts,
                pid=running.pid,
                start_time=running.start_time,
                started=running.started or status.started or time.time(),
                restarts=status.restarts,
                backoff=status.backoff,
                resources=status.resources,
                ports=status.ports,
                disks=status.disks,
                notes=status.notes,
            ),
        )
        if not named and managed.instance.port:
            await self.ports.networks.converged(managed.tenant.name)  # its name resolves again
        if managed.hold != "watched":
            self._watch(managed, adopted=True)
        self._expect(managed)

    def _state(self, managed: ManagedInstance) -> Literal["starting", "running"]:
        """The state of an instance whose first process runs."""
        return "running" if self.driver(managed).is_ready(managed.instance.id) else "starting"

    async def _become_ready(self, managed: ManagedInstance) -> None:
        """Wait until an instance that is starting is ready, and record that it runs. It may take as long as it takes;
        if it can't become ready, it is left as it is, and that is a problem of this host."""
        try:
            ready = await self.driver(managed).ready(managed.instance.id)
            async with managed.lock:
                if not ready:
                    await self._fail(managed)
                elif managed.observed and managed.observed.state == "starting":
                    managed.observed = managed.observed._replace(state="running")
                    if managed.status.state == "starting":
                        self.statuses.note(managed, state="running")
                    self.watches.ready(managed)
        except (InsulaError, OSError) as error:
            self.context.problems.report(managed.label, error)
            return
        self._nudge(managed)

    async def _fail(self, managed: ManagedInstance) -> bool:
        """Record that its program could not be executed, if that is so, which an instance tells while it starts."""
        if managed.status.state != "starting" or not (error := await self.driver(managed).failure(managed.instance.id)):
            return False
        self.watches.end(managed)
        if managed.watcher:
            managed.watcher.cancel()
        await self.discard(managed)
        self.statuses.note(managed, pid=None, start_time=None, started=None)
        self._failed(managed, error, by_policy=managed.status.restarts > 0)
        self.ports.networks.changed(managed.tenant.name)
        return True

    async def pause(self, managed: ManagedInstance) -> None:
        with contextlib.suppress(NotFound):  # it is just ending
            await self.driver(managed).pause(managed.instance.id)
        self._frozen(managed, frozen=True)

    async def unpause(self, managed: ManagedInstance) -> None:
        await self.driver(managed).resume(managed.instance.id)
        self._frozen(managed, frozen=False)
        self._expect(managed)

    def _expect(self, managed: ManagedInstance) -> None:
        """Wait in the background for an instance that is starting to be ready."""
        if managed.status.state == "starting" and (managed.becoming is None or managed.becoming.done()):
            managed.becoming = self._tasks.spawn(self._become_ready(managed))

    def _frozen(self, managed: ManagedInstance, *, frozen: bool) -> None:
        state = "paused" if frozen else self._state(managed)
        if managed.observed and managed.observed.state in ("running", "paused"):
            managed.observed = managed.observed._replace(state=state)
            self.statuses.note(managed, state=state, observed_generation=managed.instance.generation)

    def _watch(self, managed: ManagedInstance, *, adopted: bool = False) -> None:
        managed.hold, managed.stopping, managed.exit = "watched", None, None
        managed.exited.clear()
        self.ports.networks.started(managed.tenant.name)
        managed.watcher = self._tasks.spawn(self._await_end(managed))
        self._expect(managed)
        self.watches.begin(managed, adopted=adopted)

    async def _await_end(self, managed: ManagedInstance) -> None:
        """Wait for the end of its first process, and nudge the controller."""
        managed.exit = await self._exit(managed)
        if managed.observed:
            managed.observed = managed.observed._replace(state="ended")
        managed.exited.set()
        self._nudge(managed)

    async def _exit(self, managed: ManagedInstance) -> Exit:
        """Wait for its end and return its exit. A failure, such as a full /run, is a problem, and is tried again."""
        name = f"end of {managed.label}"
        while True:
            try:
                ended = await self.driver(managed).wait(managed.instance.id)
            except NotFound:
                ended = Exit(exit_status=None, finished=time.time())
            except Exception as error:
                self.context.problems.report(name, error)
                await asyncio.sleep(_RETRY)
                continue
            self.context.problems.solved(name)
            return ended

    # -- ending ----------------------------------------------------------------------------------------------------

    async def stop(self, managed: ManagedInstance, most: float | None = None) -> None:
        """Send its stop signal, and SIGKILL after its timeout or `most` seconds, whichever is less. Return when it has
        ended, or when the desired state may have changed; called again, it goes on waiting."""
        instance = managed.instance
        timeout = instance.spec.stop_timeout if instance.stop_timeout is None else instance.stop_timeout
        timeout = timeout if most is None else min(timeout, most)
        if managed.stopping is None:
            managed.stopping = time.monotonic()
            signal = self._signal(managed, stop_signal(instance), thaw=managed.status.state == "paused")
            await within_limit(f"the stop signal to instance {instance.name}", signal)
            self.statuses.note(managed, state="stopping")
        left = managed.stopping + timeout - time.monotonic()
        if left > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await managed.wake.wait()
                return
        await self.driver(managed).sync(instance.id)
        await self.kill(managed)

    async def kill(self, managed: ManagedInstance) -> None:
        """Send SIGKILL and wait for its end. Failed if it does not die."""
        driver, instance, name = self.driver(managed), managed.instance.id, f"instance {managed.instance.name}"
        managed.stopping = managed.stopping or time.monotonic()
        self.statuses.note(managed, state="stopping")
        await within_limit(f"SIGKILL to {name}", self._signal(managed, SIGKILL, thaw=True))
        for patience in (_USUAL, _DYING):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await managed.exited.wait()
            if managed.exited.is_set():
                return
            if group := driver.frozen_elsewhere(instance):
                raise undying(managed, group)
            looking = asyncio.to_thread(driver.observe, managed.instance, managed.status)
            found = await within_limit(f"looking at {name}", looking)
            if found.state == "none":  # its records are missing: kill everything in its control group
                await within_limit(f"clearing away {name}", driver.discard(managed.instance))
        raise undying(managed, None)

    async def _signal(self, managed: ManagedInstance, number: int, *, thaw: bool) -> None:
        """Send a signal to its first process. While frozen it reacts to none, not even SIGKILL; `thaw` resumes it."""
        with contextlib.suppress(NotFound):
            self.driver(managed).signal(managed.instance.id, number)
        if thaw:
            await self.driver(managed).resume(managed.instance.id)
            for member in pid_members(self.managed, managed):  # all in a PID namespace die before its first process
                await self.driver(member).resume(member.instance.id)

    async def collect_exit(self, managed: ManagedInstance) -> None:
        """Record its exit as its status, answer the waiters, store it, and remove its remains on this host."""
        if (ended := managed.exit) is None:
            ended = await self._exit(managed)
        if not await self._fail(managed):
            await self._conclude(managed, ended)

    async def lose(self, managed: ManagedInstance) -> None:
        """Record that it ended with an unknown exit status."""
        await self._conclude(managed, Exit(exit_status=None, finished=time.time()))

    async def _conclude(self, managed: ManagedInstance, ended: Exit) -> None:
        self.watches.end(managed)
        observed, status = managed.observed or Observed("none"), managed.status
        if status.state != "exited" or status.exit != ended:
            self.statuses.set(managed, self._after(managed, observed, ended))
            self.ports.networks.changed(managed.tenant.name)
        if not managed.ended.done():
            managed.ended.set_result(ended)
        if not managed.instance.spec.remove:  # else its end is not stored
            await self.statuses.saved(managed)
        # its log is in the directory that may go afterwards
        await together(self.driver(managed).flushed(managed.instance.id), self.discard(managed))

    def _after(self, managed: ManagedInstance, observed: Observed, ended: Exit) -> InstanceStatus:
        """The status of an ended instance. If it was started since the host booted, its restart policy may set the time
        of the next start."""
        status, record = managed.status, observed.record
        started = (observed.running.started if observed.running else None) or status.started
        backoff = 0 if started and ended.finished - started >= STEADY else status.backoff
        starts = record.starts if record else managed.instance.starts
        again = None
        wanted = starts == managed.instance.starts and managed.instance.wanted in ("running", "paused")
        of_this_boot = record is None or record.boot == self.boot
        if wanted and of_this_boot and after_exit(managed.instance.spec.restart, ended, status.restarts):
            again = time.time() + delay(backoff)
        return InstanceStatus(
            state="exited",
            observed_generation=status.observed_generation,
            starts=starts,
            started=started,
            exit=ended,
            restarts=status.restarts,
            backoff=backoff,
            next_start=again,
        )

    async def discard(self, managed: ManagedInstance) -> None:
        """Remove its remains on this host, but not its directory. Failed."""
        try:
            await self._discard(managed)
        except OSError as error:
            raise Failed(f"its remains can't be removed: {error}", "it is tried again") from error

    async def _discard(self, managed: ManagedInstance) -> None:
        """Kill its processes, store what they have used, and remove its container, port and name."""
        instance = managed.instance
        await self.accounts.settle(managed)
        await together(self.driver(managed).discard(instance), self.ports.unplug(managed.tenant, instance.ports))
        managed.hold = "tidy"
        managed.observed = Observed("none", record=managed.observed.record if managed.observed else None)

    async def remove(self, managed: ManagedInstance) -> None:
        """Delete it from the store, and then its directory. If the daemon dies in between, the next start removes the
        directory as a leftover."""
        managed.gone = True  # from now on no status is stored
        try:
            await self.statuses.saved(managed)
            led = await delete_instance(self.context, managed.instance, self.accounts)
        except BaseException:
            managed.gone = False
            raise
        self.context.problems.solved(managed.records)
        self.managed.remove(managed)
        managed.vanished.set()
        if led:
            self.ports.networks.nudge(managed.tenant.name)
        for attachment in managed.waiting:
            attachment.fail(NotFound(f"instance {managed.instance.name} was removed"))
        instance = managed.instance
        gone = await self.remove_directory(self.driver(managed), instance.id, flush=True)
        if gone and instance.project_id is not None:
            await release_project(self.context, instance.project_id, instance.id)

    async def remove_directory(self, driver: Driver, instance_id: str, *, flush: bool = False) -> bool:
        """Remove the directory of an instance, however many files it has. A failure is a problem of this host; it is
        False.

        With `flush`, the store's transactions are made durable before.
        """
        name, problems = f"directory of instance {instance_id}", self.context.problems
        late = f"it is still being removed after {LIMIT:g} s"
        timer = asyncio.get_running_loop().call_later(LIMIT, problems.__setitem__, name, late)
        try:
            if flush:
                await self.context.store.flush()
            await driver.remove_directory(instance_id)
            problems.solved(name)
            return True
        except (InsulaError, OSError) as error:
            problems[name] = str(error)
            return False
        finally:
            timer.cancel()
