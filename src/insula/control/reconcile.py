"""Make what is on the host match what the store wants, after any crash.

This runs at every start of the daemon, while requests are answered already. It looks at what is there (containers,
directories, the kernel's networks), never at what somebody meant to do, so it does the same after a clean stop, after
kill -9 and after a reboot. For one instance there are three witnesses: the store (wanted, and the last settled status),
its `launch.json` (which start was begun last, in which life of the host) and the runtime (a container that runs, ended,
or isn't there). `decide` is the whole logic, and pure.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Coroutine, Sequence
from enum import Enum, auto
from typing import TypeVar

import msgspec

from insula.control.instances import limits
from insula.control.instances.damaged import id_of
from insula.control.instances.drivers.base import Driver, Observed, Running, State
from insula.control.instances.drivers.directory import LaunchRecord, boot_id
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.restart_policy import after_boot
from insula.control.instances.supervisor import Supervisor, records_of
from insula.control.instances.verbs import Instances
from insula.control.keys import INSTANCES, NETWORKS, STATUS, TENANTS, USAGE
from insula.control.networks.verbs import Networks
from insula.control.tenants import Tenants
from insula.model.errors import Failed, InsulaError
from insula.model.objects import Exit, Instance, InstanceStatus, Tenant
from insula.network.intent import TenantIntent
from insula.store.protocol import Delete, Snapshot
from insula.store.typed import Found, Keyspace

log = logging.getLogger("insula.reconcile")
T = TypeVar("T")
LIMIT = 30.0
"""Seconds that one attempt at an instance may take, or the networks of all tenants together."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts


class Action(Enum):
    REMOVE = auto()  # a removal was interrupted
    ADOPT = auto()  # it runs as wanted
    STOP = auto()  # it runs and should not
    REPLACE = auto()  # an earlier start of it runs
    HARVEST = auto()  # it ended meanwhile: its exit is known to the runtime
    LAUNCH = auto()  # a start was wanted and didn't happen
    LOST = auto()  # it ran, and nobody knows how it ended
    REBOOTED = auto()  # it ended, or the host did, and the host was started again
    RESUME = auto()  # it had ended and that is known: what the policy says
    NOTHING = auto()


def decide(
    instance: Instance, status: InstanceStatus | None, record: LaunchRecord | None, found: State, boot: str
) -> Action:
    """What to do about one instance."""
    if instance.wanted == "removed":
        return Action.REMOVE
    current = record is not None and record.starts == instance.starts
    if found in ("running", "paused"):
        if instance.wanted == "stopped":
            return Action.STOP
        return Action.ADOPT if current else Action.REPLACE
    if found == "ended" and current:
        return Action.HARVEST
    if record is None or not current:
        return Action.LAUNCH if instance.wanted == "running" else Action.NOTHING
    known = status is not None and status.starts == instance.starts and status.state in ("exited", "failed")
    if record.boot != boot:
        return Action.REBOOTED
    if known:
        return Action.RESUME
    if found == "created" or status is None or status.starts < instance.starts:
        return Action.LAUNCH if instance.wanted == "running" else Action.NOTHING
    return Action.LOST


class Reconciler:
    """`load` reads the store, and `run` looks at this host: networks by tenant, then each instance on its own.

    Requests are answered between the two. What concerns an instance waits for `ManagedInstance.reconciled`, what
    concerns a tenant's networks for `Context.prepared`. No instance is waited for by others, and none for ever: an
    attempt that fails or takes more than `LIMIT` seconds is a problem of this host, and is repeated after a pause.
    """

    def __init__(self, tenants: Tenants, networks: Networks, instances: Instances, supervisor: Supervisor) -> None:
        self.context = supervisor.context
        self.problems = supervisor.context.problems
        self.tenants = tenants
        self.networks = networks
        self.instances = instances
        self.supervisor = supervisor
        self.boot = boot_id()
        self._strays: list[tuple[Driver, str]] = []  # what is left of instances that nobody knows
        self._directories: set[str] = set()
        self._at_work: dict[str, asyncio.Task[None]] = {}  # on the networks of a tenant
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def certain(self) -> bool:
        """Whether everything in the store can be read: else nothing is anybody's leftover."""
        return not self.context.unreadable

    # -- before anything is answered ---------------------------------------------------------------------------------

    async def load(self) -> None:
        """Every instance as the store has it, and what on this host belongs to none. Nothing of one is looked at."""
        store = self.context.store
        entries, statuses, networks, usages, tenants = await asyncio.gather(
            *(store.list(kind.prefix_all()) for kind in (INSTANCES, STATUS, NETWORKS, USAGE, TENANTS))
        )
        owners = {found.value.name: found.value for found in self._whole(TENANTS, tenants)}
        self._whole(NETWORKS, networks)
        self._whole(USAGE, usages, needed=False)
        known = {}
        for entry in statuses.entries:
            for found in self._whole(STATUS, Snapshot([entry], 0), needed=False):
                known[STATUS.parts(entry.key)] = found.value
        ids, old = {id_of(entry) for entry in entries.entries}, list[ManagedInstance]()
        for instance, revision in self._whole(INSTANCES, entries):
            status = known.pop((instance.tenant, instance.name), None)
            if instance.host not in ("", self.context.host):
                continue
            own = msgspec.structs.replace(instance, host=self.context.host)
            if owner := owners.get(instance.tenant):
                member = ManagedInstance(owner, own, status or InstanceStatus(state="created"), revision)
                member.reconciled.clear()
                if not instance.host:
                    old.append(member)
                self.supervisor.add(member)
            else:
                self.problems[f"instance {instance.tenant}/{instance.name}"] = "there is no record of its tenant"
        if old:
            await self._guarded("records of 0.1.0", self._take(old))
        if self.certain and known:
            await store.transact([], [Delete(STATUS.key(*parts)) for parts in known])
        self.context.preparing.update({name: asyncio.Event() for name in owners})
        if self.certain:
            await self._guarded("leftovers", asyncio.to_thread(self._find_leftovers, ids))
            await self._guarded(
                "networks of tenants that are gone",
                asyncio.to_thread(self.context.fabric.sweep, list(owners.values())),
            )

    def _whole(self, kind: Keyspace[T], snapshot: Snapshot, *, needed: bool = True) -> Sequence[Found[T]]:
        """The objects among these entries; each damaged one is a problem."""
        good, bad = kind.sort_out(snapshot.entries)
        for entry, error in bad:
            self.problems[f"record {entry.key}"] = str(error)
            if needed:
                self.context.unreadable.add(entry.key)
        return good

    async def _take(self, members: Sequence[ManagedInstance]) -> None:
        """Commit that these are of this host: 0.1.0 stored no host, for a store had one."""
        puts = [INSTANCES.put(member.instance, *member.key) for member in members]
        revision = await self.context.store.transact([], puts)
        for member in members:
            member.revision = revision

    def _find_leftovers(self, ids: set[str | None]) -> None:
        self._strays = [(d, each) for d in self.context.drivers.values() for each in d.ids() - ids]
        self._directories = set(os.listdir(self.context.settings.instances)) - ids

    # -- once requests are answered ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Everything once; then it returns, and what failed is repeated behind its back."""
        members = [member for member in self.supervisor.of(None) if not member.reconciled.is_set()]
        for member in members:
            self.spawn(self._reconcile(member))
        self.spawn(self._sweep())
        await self.repair()
        await asyncio.gather(*(member.reconciled.wait() for member in members))
        log.info("every instance was looked at")

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """A task that `stop` ends."""
        task = self.supervisor.spawn(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def stop(self) -> None:
        """End reconciliation, for what is taken down must not be made again. Threads that it has started may run on:
        the fabric waits for those that use it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for event in self.context.preparing.values():
            event.set()
        for member in self.supervisor.of(None):
            member.reconciled.set()

    async def repair(self) -> None:
        """Make networks and control groups of tenants right again; nothing happens to those that are right."""
        tenants = await TENANTS.readable(self.context.store)
        waiting = set(self.context.preparing)
        for tenant in tenants:
            if tenant.name not in self._at_work:  # one that hangs is not joined by more and more of them
                work = self._guarded(f"networks of tenant {tenant.name}", self._prepare(tenant))
                task = self._at_work[tenant.name] = self.spawn(work)
                task.add_done_callback(lambda _, name=tenant.name: self._at_work.pop(name))  # type: ignore[misc]
        if self._at_work:
            _, late = await asyncio.wait(list(self._at_work.values()), timeout=LIMIT)
            if late:
                self.problems["networks"] = f"{len(late)} tenants are still being looked at after {LIMIT:g} s"
            else:
                self.problems.solved("networks")
        for name in waiting:
            if event := self.context.preparing.pop(name, None):
                event.set()

    # -- networks --------------------------------------------------------------------------------------------------

    async def _prepare(self, tenant: Tenant) -> None:
        """One tenant's networks. Its lock is held, so that nothing of it changes meanwhile."""
        name = tenant.name
        async with self.context.locks[name]:
            intent = await self.tenants.intents.build(tenant)
            if intent is None:  # it was removed
                return
            await self._guarded(f"limits of tenant {name}", asyncio.to_thread(self.context.groups.ensure, tenant))
            await self._guarded(f"tenant {name}", self._apply(intent))
        if event := self.context.preparing.pop(name, None):
            event.set()

    async def _apply(self, intent: TenantIntent) -> None:
        """Have the fabric make it. What can't be made is a problem for each part; raises what all of it fails for."""
        name = intent.tenant.name
        errors = await asyncio.to_thread(self.context.fabric.apply, intent)
        named = {part: f"{part} of tenant {name}" for part in {*errors, "leftovers", "names"} - {"tenant"}}
        named |= {f"port {port.instance}": f"port of instance {name}/{port.instance}" for port in intent.ports}
        named |= {f"network {network.name}": f"network {name}/{network.name}" for network in intent.networks}
        for part, problem in named.items():
            if error := errors.get(part):
                self.problems.report(problem, error)
            else:
                self.problems.solved(problem)
        if error := errors.get("tenant"):
            raise error

    async def _guarded(self, name: str, work: Awaitable[object]) -> None:
        """`work`; its failure, whatever it is, is a problem of this host and not the end of reconciliation."""
        try:
            await work
            self.problems.solved(name)
        except Exception as error:
            self.problems.report(name, error)

    # -- leftovers -------------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Containers, directories and control groups that belonged to no instance when the daemon started."""
        for driver, stray in self._strays:
            await self._guarded(f"container {stray}", asyncio.wait_for(driver.discard_stray(stray), LIMIT))
        for name in self._directories:
            for driver in self.context.drivers.values():
                await self.supervisor.remove_stray_directory(driver, name)

    # -- instances -------------------------------------------------------------------------------------------------

    async def _reconcile(self, member: ManagedInstance) -> None:
        """Attempts until one succeeds. After the first the user may try, too."""
        pause = _FIRST_PAUSE
        while not await self._attempt(member):
            member.reconciled.set()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        member.reconciled.set()

    async def _attempt(self, member: ManagedInstance) -> bool:
        """Look at it, and do what follows. Whether that succeeded; what failed is a problem of this host."""
        name, action = f"instance {'/'.join(member.key)}", None
        try:
            async with asyncio.timeout(LIMIT), member.lock:
                if member.gone or member.watched:  # the user was faster
                    return True
                action, found = await asyncio.to_thread(self._look, member)
                log.info("%s: %s", name, action.name.lower())
                if found.damaged:
                    self.problems[records_of(member)] = f"damaged: {', '.join(found.damaged)}; {_SAID[action]}"
                await self._act(member, action, found)
        except TimeoutError:
            if name not in self.problems:
                doing = action.name.lower() if action else "look"
                self.problems[name] = f"is not as it should be: {doing} takes more than {LIMIT:g} s; it is tried again"
            return False
        except Exception as error:
            self.problems.report(name, error)
            return False
        self.problems.solved(name)
        return True

    def _look(self, member: ManagedInstance) -> tuple[Action, Observed]:
        """What to do about it, and what was found. Blocks."""
        driver = self.supervisor.driver(member)
        found = driver.observe(member.instance, member.status)
        return decide(member.instance, member.status, found.record, found.state, self.boot), found

    async def _adopt(self, member: ManagedInstance, found: Observed) -> None:
        running = found.running
        if running is None:
            raise Failed("its records vanished", "look at the run directory")
        named = member.active
        self.supervisor.adopt(
            member,
            InstanceStatus(
                state="paused" if found.state == "paused" else "running",
                starts=member.instance.starts,
                pid=running.pid,
                start_time=running.start_time,
                started=running.started or time.time(),
                restarts=member.status.restarts,
                backoff=member.status.backoff,
                resources=member.status.resources,
            ),
        )
        if not named:
            await self.supervisor.update_names(member.tenant)
        if member.status.resources != member.instance.spec.resources:
            self.supervisor.spawn(limits.repair(self.supervisor, member))

    async def _act(self, member: ManagedInstance, action: Action, found: Observed) -> None:
        supervisor, instances = self.supervisor, self.instances
        if action is Action.ADOPT:
            await self._adopt(member, found)
        elif action is Action.REMOVE:
            if found.state in ("running", "paused"):
                await self._adopt(member, found)  # its end is waited for
            else:
                member.status = msgspec.structs.replace(member.status, state="exited", pid=None, start_time=None)
            await supervisor.remove(member)
        elif action is Action.STOP:
            await self._adopt(member, found)
            supervisor.spawn(instances.finish_stop(member))
        elif action in (Action.LAUNCH, Action.REPLACE):
            await supervisor.discard(member)
            supervisor.spawn(self._launch(member))
        elif action is Action.HARVEST:
            await self._harvest(member, found)
        elif action is Action.LOST:
            await self._conclude(member, Exit(exit_status=None, finished=time.time()), found.running)
        elif action is Action.REBOOTED:
            await self._rebooted(member)
        elif action is Action.RESUME:
            await supervisor.discard(member)
            supervisor.resume(member)
        elif action is Action.NOTHING:
            await supervisor.discard(member)

    async def _harvest(self, member: ManagedInstance, found: Observed) -> None:
        ended = await self.supervisor.driver(member).wait(member.instance.id)
        await self._conclude(member, ended, found.running)

    async def _conclude(
        self, member: ManagedInstance, ended: Exit, running: Running | None = None, *, restart: bool = True
    ) -> None:
        before = member.status
        member.status = InstanceStatus(
            state="running",
            starts=member.instance.starts,
            started=(running.started if running else None) or before.started,
            restarts=before.restarts,
            backoff=before.backoff,
        )
        await self.supervisor.conclude(member, ended, restart=restart)

    async def _launch(self, member: ManagedInstance) -> None:
        async with member.lock:
            if not member.gone and member.instance.wanted == "running" and not member.active:
                try:
                    await self.supervisor.launch(member)
                except InsulaError as error:  # as when it shares the processes of one that is not up yet
                    log.warning("instance %s/%s does not start: %s", *member.key, error)
                    self.supervisor.retry(member)

    async def _rebooted(self, member: ManagedInstance) -> None:
        """The host came up again: what ran has ended with it, and runs again if its policy says so."""
        await self.supervisor.discard(member)
        if member.status.state not in ("exited", "failed"):
            ended = Exit(exit_status=None, finished=time.time())
            if after_boot(member.instance, started_before=True):
                member.status = InstanceStatus(state="exited", starts=member.instance.starts, exit=ended)
            else:
                await self._conclude(member, ended, restart=False)
        if after_boot(member.instance, started_before=True):
            starts = member.instance.starts + 1
            await self.supervisor.want(member, wanted="running", starts=starts)
            self.supervisor.spawn(self._launch(member))


_SAID = defaultdict(
    lambda: "it is as its other records say",
    {
        Action.ADOPT: "it runs on",
        Action.REPLACE: "it is started anew",
        Action.LAUNCH: "it is started",
        Action.LOST: "how it ended is not known",
    },
)
