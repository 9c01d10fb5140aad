"""`InstanceController`: makes every instance of this host match the desired state in the store.

It reconciles an instance when a verb has committed a change (`committed`), when another daemon has changed the store,
when its first process ends, when a restart is due, once a minute, and when the daemon starts. Each time it does the
same: observe, unless its own actions have kept `observed` up to date; `decide`; act; until nothing is to do.

Each instance has one worker at a time, and workers don't wait for each other. An action that fails, or takes longer
than `LIMIT`, is a problem of this host, and is tried again after a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from insula.control.accounting.accounts import Accounts
from insula.control.context import Context, going_down
from insula.control.instances.decide import DONE, Action, decide
from insula.control.instances.drivers.base import Observed, Running
from insula.control.instances.drivers.directory import LaunchRecord
from insula.control.instances.lifecycle import Lifecycle
from insula.control.instances.managed import READY, Failure, ManagedInstance, ManagedInstances, Waiter
from insula.control.instances.recorder import Recorder
from insula.control.instances.resizing import attach_disks, resize
from insula.control.instances.statuses import NO_ERROR, Statuses, error_fields
from insula.control.keys import INSTANCES, STATUS, TENANTS
from insula.control.networks.ports import Ports
from insula.control.tasks import Tasks, within_limit
from insula.model.errors import Failed, InsulaError, Unavailable
from insula.model.objects import Instance, InstanceStatus
from insula.store.protocol import Compacted, Event

log = logging.getLogger("insula.reconcile")
DOWN_TIMEOUT = 2.0
"""The longest time in seconds between the stop signal and SIGKILL during `insula down`."""
_PATIENT = frozenset({Action.LAUNCH, Action.RELAUNCH, Action.STOP, Action.REPLACE, Action.KILL, Action.REMOVE})
"""Actions that are not limited to `LIMIT`, since they wait for a program or must not be cut off. Their steps are."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts
_SOON = 0.02  # seconds from a change in the store until it is read; changes of this daemon are known by then
_LOOK = 30.0  # seconds that the periodic pass waits for one instance
_AT_ONCE = 16  # instances that the periodic pass or `stop_all` handles at a time


class InstanceController:
    """The controller. `admitting` has the ids of instances whose first commit is under way; `create` adds them."""

    def __init__(
        self, context: Context, managed: ManagedInstances, ports: Ports, tasks: Tasks, accounts: Accounts
    ) -> None:
        self.context = context
        self.managed = managed
        self.recorder = Recorder(context.store)
        self.statuses = Statuses(context.store, tasks)
        self.lifecycle = Lifecycle(
            context, managed, ports, self.statuses, self.recorder, accounts, tasks, self.nudge, self._report_failure
        )
        self.admitting: set[str] = set()
        self._tasks = tasks
        self._watching: asyncio.Task[None] | None = None
        self._pending: list[Event] = []  # changes in the store that were not handled yet
        self._closed = False

    # -- triggers --------------------------------------------------------------------------------------------------

    def add(self, managed: ManagedInstance) -> None:
        """Manage one more instance of this host."""
        self.managed.add(managed)
        self.lifecycle.driver(managed).make_room(len(self.managed))

    def create(self, managed: ManagedInstance) -> None:
        """Manage an instance that was just committed, and of which nothing is on this host."""
        managed.hold, managed.observed = "tidy", Observed("none")
        managed.reconciled.set()
        self.admitting.discard(managed.instance.id)
        self.add(managed)
        self.nudge(managed)
        if managed.instance.spec.published:
            self.lifecycle.ports.networks.nudge(managed.tenant.name)

    def committed(self, instance: Instance, revision: int) -> None:
        """Take the desired state of an instance of this host that was committed at that revision, and reconcile it."""
        managed = self.managed.find(instance.tenant, instance.name)
        if managed is None and (managed := self.managed.with_id(instance.id)):  # it has another name now
            self.managed.rename(managed, instance, revision)
            if managed.active and instance.ports:
                self.lifecycle.ports.networks.nudge(managed.tenant.name)
        elif managed and revision > managed.revision:
            managed.instance, managed.revision = instance, revision
        if managed:
            self.nudge(managed)

    def nudge(self, managed: ManagedInstance) -> None:
        """Have the instance reconciled."""
        managed.wake.set()
        if not managed.busy and not managed.gone and not self._closed:
            managed.worker = self._tasks.spawn(self._work(managed))

    async def begin(self, revision: int) -> None:
        """Reconcile all loaded instances, and from now on each one that changes in the store after `revision`. Return
        when every loaded instance was reconciled once."""
        self._watching = self._tasks.spawn(self._watch(revision))
        loaded = [managed for managed in self.managed.all() if not managed.reconciled.is_set()]
        for managed in loaded:
            self.nudge(managed)
        await asyncio.gather(*(managed.reconciled.wait() for managed in loaded))
        log.info("every instance was looked at")

    async def resync(self) -> None:
        """Observe and reconcile every instance, a few at a time, in case another program has changed this host."""
        few = asyncio.Semaphore(_AT_ONCE)

        async def look(managed: ManagedInstance) -> None:
            async with few:
                if not managed.busy and not managed.gone:
                    managed.observed = None
                    self.nudge(managed)
                if managed.worker:
                    await asyncio.wait([managed.worker], timeout=_LOOK)

        await asyncio.gather(*(look(managed) for managed in self.managed.all()))

    # -- changes in the store by other daemons -----------------------------------------------------------------------

    async def _watch(self, revision: int) -> None:
        while True:
            try:
                async for event in self.context.store.watch(INSTANCES.prefix_all(), revision):
                    revision = event.revision
                    self._enqueue([event], _SOON)
                return  # the store is closed
            except Compacted:
                revision = await self._catch_up()
            except Exception as error:
                self.context.problems.report("changes of instances", error)
                await asyncio.sleep(_FIRST_PAUSE)

    def _enqueue(self, events: Sequence[Event], pause: float) -> None:
        """Handle these events together after a pause. By then this daemon's own verbs have called `committed` for
        theirs, which need not be decoded again."""
        if not self._pending:
            asyncio.get_running_loop().call_later(pause, self._dequeue)
        self._pending.extend(events)

    def _dequeue(self) -> None:
        pending, self._pending = {event.entry.key: event for event in self._pending}.values(), []
        if (news := [event for event in pending if self._is_new(event)]) and not self._closed:
            self._tasks.spawn(self._handle_all(news))

    async def _handle_all(self, events: Sequence[Event]) -> None:
        try:
            for event in events:
                await self._handle(event)
            self.context.problems.solved("changes of instances")
        except Exception as error:
            self.context.problems.report("changes of instances", error)
            self._enqueue(events, _FIRST_PAUSE)

    def _is_new(self, event: Event) -> bool:
        """Whether this daemon doesn't know the change yet. Deletions of this host's instances are always its own."""
        managed = self.managed.find(*INSTANCES.parts(event.entry.key))
        return event.kind == "put" and (managed is None or managed.revision < event.revision)

    async def _catch_up(self) -> int:
        """Handle every instance as it is in the store now, and return the store's revision."""
        snapshot = await self.context.store.list(INSTANCES.prefix_all())
        for entry in snapshot.entries:
            await self._handle(Event("put", entry, None, entry.revision))
        return snapshot.revision

    async def _handle(self, event: Event) -> None:
        try:
            instance = INSTANCES.decode(event.entry)
        except Failed:
            return  # damaged; the next start of the daemon reports it
        if instance.host != self.context.host or instance.id in self.admitting:
            return
        if self.managed.with_id(instance.id):
            self.committed(instance, event.revision)
        else:
            await self._take_over(*INSTANCES.parts(event.entry.key))

    async def _take_over(self, tenant: str, name: str) -> None:
        """Manage an instance that another daemon has placed on this host, unless it was removed meanwhile."""
        store = self.context.store
        status = await STATUS.get(store, tenant, name)
        owner, found = await TENANTS.get(store, tenant), await INSTANCES.get(store, tenant, name)
        if owner is None or found is None or found.value.host != self.context.host:
            return
        if found.value.id not in self.admitting and not self.managed.with_id(found.value.id):
            known = status.value if status else InstanceStatus(state="created")
            self.add(managed := ManagedInstance(owner.value, found.value, known, found.revision))
            self.nudge(managed)

    # -- the worker --------------------------------------------------------------------------------------------------

    async def _work(self, managed: ManagedInstance) -> None:
        """Reconcile until nothing is to do. After a failure try again when something changes, or after a pause."""
        pause = _FIRST_PAUSE
        while managed.wake.is_set() and not managed.gone:
            try:
                async with managed.lock:
                    with self.context.telemetry.instances.one():
                        await self._reconcile(managed)
                self.context.problems.solved(managed.label)
            except Exception as error:
                self._report_failure(managed, error)
                managed.reconciled.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await managed.wake.wait()
                managed.wake.set()
                pause = min(2 * pause, _LONGEST_PAUSE)
        managed.reconciled.set()

    async def _reconcile(self, managed: ManagedInstance) -> None:
        """Decide and act until nothing is to do. The caller holds the instance's lock."""
        while not managed.gone:
            managed.wake.clear()
            if managed.observed is None:
                await within_limit(f"looking at instance {managed.instance.name}", self._observe(managed))
            assert managed.observed is not None
            instance, now = self._desired(managed), time.time()
            action = decide(instance, managed.status, managed.observed, managed.hold, self.lifecycle.boot, now)
            self._log(managed, action)
            if action in DONE:
                break
            await self._act(managed, action)
            self._answer(managed)
        else:
            self._answer(managed, done=True)
            return
        self._settled(managed, action)

    async def _observe(self, managed: ManagedInstance) -> None:
        """Set `observed` from the driver. While its first process is watched, only the watcher's word counts as its
        end, for the watcher holds a descriptor of it; records may be missing because another program deleted them."""
        observe, status = self.lifecycle.driver(managed).observe, managed.status
        found = await asyncio.to_thread(observe, managed.instance, status)
        if managed.hold == "watched" and managed.exited.is_set():
            found = found._replace(state="ended")
        elif managed.hold == "watched" and found.state not in ("starting", "running", "paused"):
            running = Running(status.pid or 0, status.start_time or 0, status.started)
            found = Observed("running", running, LaunchRecord(starts=status.starts, boot=self.lifecycle.boot))
        managed.observed = found

    def _desired(self, managed: ManagedInstance) -> Instance:
        """The desired state; "stopped" while everything is being removed from this host."""
        instance = managed.instance
        if not self.context.going_down.is_set() or instance.wanted == "removed":
            return instance
        return msgspec.structs.replace(instance, wanted="stopped")

    async def _act(self, managed: ManagedInstance, action: Action) -> None:
        lifecycle = self.lifecycle
        match action:
            case Action.LAUNCH:
                work = lifecycle.launch(managed)
            case Action.RELAUNCH:
                work = lifecycle.launch(managed, by_policy=True)
            case Action.ADOPT:
                work = lifecycle.adopt(managed)
            case Action.PAUSE:
                work = lifecycle.pause(managed)
            case Action.UNPAUSE:
                work = lifecycle.unpause(managed)
            case Action.RESIZE:
                work = resize(self.context, self.statuses, managed, lifecycle.driver(managed))
            case Action.DISKS:
                work = attach_disks(self.statuses, managed, lifecycle.driver(managed))
            case Action.PLUG:
                work = lifecycle.plugging.plug(managed, lifecycle.driver(managed))
            case Action.UNPLUG:
                work = lifecycle.plugging.unplug(managed, lifecycle.driver(managed))
            case Action.STOP | Action.REPLACE:
                work = lifecycle.stop(managed, DOWN_TIMEOUT if self.context.going_down.is_set() else None)
            case Action.KILL:
                work = lifecycle.kill(managed)
            case Action.COLLECT_EXIT:
                work = lifecycle.collect_exit(managed)
            case Action.LOST:
                work = lifecycle.lose(managed)
            case Action.DISCARD:
                work = lifecycle.discard(managed)
            case Action.START_ANEW:
                work = lifecycle.start_anew(managed)
            case _:
                work = lifecycle.remove(managed)
        if action in _PATIENT:
            await work
        else:
            await within_limit(f"{_DOING[action]} instance {managed.instance.name}", work)

    # -- answers to verbs --------------------------------------------------------------------------------------------

    async def converged(self, managed: ManagedInstance, generation: int) -> InstanceStatus:
        """Wait until the desired state of `generation` is observed, and return the status. Raises why it failed."""
        waiter = Waiter(generation, asyncio.get_running_loop().create_future())
        managed.waiters.append(waiter)
        if not managed.busy or not (managed.wake.is_set() or managed.lock.locked()):  # or it waits after a failure
            self._answer(managed, done=True)
        await waiter.answer
        await managed.until_ready(READY)
        if managed.failure and managed.failure.generation == generation:
            raise managed.failure.error
        return managed.status

    def _settled(self, managed: ManagedInstance, action: Action) -> None:
        """Record that nothing is to do: the desired state is observed, or has failed for good."""
        if managed.timer:
            managed.timer.cancel()
            managed.timer = None
        if action is Action.WAIT:
            pause = max(0.0, (managed.status.next_start or 0.0) - time.time())
            managed.timer = asyncio.get_running_loop().call_later(pause, self.nudge, managed)
        reason: Mapping[str, None] = {}
        if managed.status.state != "failed":
            managed.failure, reason = None, NO_ERROR
        self.statuses.note(managed, observed_generation=managed.instance.generation, **reason)
        if self.context.going_down.is_set():
            managed.vanished.set()
        self._answer(managed, done=True)

    def _answer(self, managed: ManagedInstance, *, done: bool = False) -> None:
        """Answer the waiters whose generation is observed. With `done` answer all of them, failures included."""
        for waiter in managed.waiters.copy():
            failed = managed.failure is not None and managed.failure.generation >= waiter.generation
            if not done and (failed or managed.status.observed_generation < waiter.generation):
                continue
            managed.waiters.remove(waiter)
            if waiter.answer.done():  # the waiting task was cancelled
                continue
            if failed and managed.failure:
                waiter.answer.set_exception(managed.failure.error)
            elif self.context.going_down.is_set() and managed.instance.wanted == "running" and not managed.active:
                waiter.answer.set_exception(going_down())
            else:
                waiter.answer.set_result(managed.status)

    def _report_failure(self, managed: ManagedInstance, error: Exception) -> None:
        """Report a failed attempt to the waiters. If there are none, it is a problem of this host."""
        known = managed.failure is not None and managed.failure.generation == managed.instance.generation
        if known or not managed.waiters or not isinstance(error, InsulaError):
            self.context.problems.report(managed.label, error)
        shown = error if isinstance(error, InsulaError) else Failed(f"{managed.label}: {error}", "see insulad's log")
        managed.failure = Failure(managed.instance.generation, shown)
        self.statuses.note(managed, observed_generation=managed.instance.generation, **error_fields(shown))
        self._answer(managed, done=True)

    def _log(self, managed: ManagedInstance, action: Action) -> None:
        """Log the action, and report damaged records when the instance is reconciled for the first time."""
        if managed.reconciled.is_set():
            log.debug("%s: %s", managed.label, action.name.lower())
            return
        log.info("%s: %s", managed.label, action.name.lower())
        if managed.observed and managed.observed.damaged:
            damaged = ", ".join(managed.observed.damaged)
            self.context.problems[managed.records] = f"damaged: {damaged}; {_SAID[action]}"

    # -- shutdown ----------------------------------------------------------------------------------------------------

    async def stop_all(self) -> None:
        """End every instance, as a part of `insula down`; `Context.going_down` is set. The desired state in the store
        stays as it is."""
        if self._watching:
            self._watching.cancel()
        few = asyncio.Semaphore(_AT_ONCE)

        async def stop(managed: ManagedInstance) -> None:
            async with few:
                self.nudge(managed)
                await self.converged(managed, managed.instance.generation)

        results = await asyncio.gather(*(stop(each) for each in self.managed.all()), return_exceptions=True)
        for managed in self.managed.all():
            self.lifecycle.driver(managed).end_of_boot(managed.instance.id)
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, Unavailable):
                raise error

    async def close(self) -> None:
        """Stop managing. The instances go on running."""
        self._closed = True
        for managed in self.managed.all():
            await self.statuses.saved(managed)
        await self.recorder.close()


_DOING = defaultdict(
    lambda: "what is to be done about",
    {
        Action.ADOPT: "adopting",
        Action.PAUSE: "pausing",
        Action.UNPAUSE: "unpausing",
        Action.RESIZE: "changing the limits of",
        Action.DISKS: "changing the disks of",
        Action.PLUG: "connecting",
        Action.UNPLUG: "disconnecting",
        Action.COLLECT_EXIT: "clearing away",
        Action.DISCARD: "clearing away",
    },
)
_SAID = defaultdict(
    lambda: "it is as its other records say",
    {
        Action.ADOPT: "it runs on",
        Action.REPLACE: "it is started again",
        Action.LAUNCH: "it is started",
        Action.LOST: "how it ended is not known",
    },
)
