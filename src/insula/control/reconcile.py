"""After any crash: makes what is on the host match what the store wants.

Run at every start of the daemon. It looks at what is there (containers, directories, the kernel's networks), never
at what somebody meant to do, so it does the same after a clean stop, after kill -9 and after a reboot. For one
instance there are three witnesses: the store (wanted, and the last settled status), its `launch.json` (which start
was begun last, in which life of the host) and the runtime (a container that runs, ended, or isn't there).
`decide` is the whole logic, and pure.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from enum import Enum, auto
from typing import Literal

from insula.container.runtime import State
from insula.control import limits
from insula.control.instances import Instances
from insula.control.keys import INSTANCES, NETWORKS, STATUS, TENANTS
from insula.control.launch import LaunchRecord, boot_id
from insula.control.networks import Networks
from insula.control.policy import after_boot
from insula.control.supervisor import Member, Supervisor, as_exit
from insula.control.tenants import Tenants
from insula.kernel import process
from insula.kernel.cgroups import Cgroup
from insula.model.errors import InsulaError
from insula.model.objects import Exit, Instance, InstanceStatus, Tenant
from insula.store.protocol import Delete

log = logging.getLogger("insula.reconcile")
Container = Literal["none", "parked", "running", "ended"]
"""What the runtime has: nothing, PID 1 that was never told to start, a running one, one that ended."""


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
    instance: Instance, status: InstanceStatus | None, record: LaunchRecord | None, container: Container, boot: str
) -> Action:
    """What to do about one instance."""
    if instance.wanted == "removed":
        return Action.REMOVE
    current = record is not None and record.generation == instance.generation
    if container == "running":
        if instance.wanted == "stopped":
            return Action.STOP
        return Action.ADOPT if current else Action.REPLACE
    if container == "ended" and current:
        return Action.HARVEST
    if record is None or not current:
        return Action.LAUNCH if instance.wanted == "running" else Action.NOTHING
    known = status is not None and status.generation == instance.generation and status.state in ("exited", "failed")
    if record.boot != boot:
        return Action.REBOOTED
    if known:
        return Action.RESUME
    if container == "parked" or status is None or status.generation < instance.generation:
        return Action.LAUNCH if instance.wanted == "running" else Action.NOTHING
    return Action.LOST


class Reconciler:
    def __init__(self, tenants: Tenants, networks: Networks, instances: Instances, supervisor: Supervisor) -> None:
        self.engine = supervisor.engine
        self.tenants = tenants
        self.networks = networks
        self.instances = instances
        self.supervisor = supervisor
        self.boot = boot_id()

    async def run(self) -> None:
        """Everything once. What can't be repaired is in `Engine.problems`; the rest goes on without it."""
        store = self.engine.store
        entries, statuses, tenants = await asyncio.gather(
            store.list(INSTANCES.prefix_all()), store.list(STATUS.prefix_all()), TENANTS.list(store)
        )
        owners = {tenant.name: tenant for tenant in tenants}
        known = {STATUS.parts(entry.key): STATUS.decode(entry) for entry in statuses.entries}
        plans: list[tuple[Member, Action]] = []
        for entry in entries.entries:
            instance = INSTANCES.decode(entry)
            status = known.pop((instance.tenant, instance.name), None)
            member = Member(
                owners[instance.tenant], instance, status or InstanceStatus(state="created"), entry.revision
            )
            self.supervisor.add(member)
            plans.append(
                (member, decide(instance, status, self._record(instance), self._container(instance), self.boot))
            )
        if known:
            await store.transact([], [Delete(STATUS.key(*parts)) for parts in known])
        for member, action in plans:  # before names are set: who runs has one
            if action is Action.ADOPT:
                self._adopt(member)
        await self._fabric(tenants)
        await self._sweep([member.instance.id for member, _ in plans])
        await asyncio.gather(*(self._guarded(f"instance {'/'.join(m.key)}", self._act(m, a)) for m, a in plans))

    def _record(self, instance: Instance) -> LaunchRecord | None:
        return self.supervisor.launcher.directory(instance.id).record()

    def _container(self, instance: Instance) -> Container:
        state = self.engine.runtime.state(instance.id)
        if state is None:
            return "none"
        if process.is_alive(state.pid, state.start_time):
            return "running" if state.executed else "parked"
        return "ended" if _ran(state) else "none"

    # -- networks --------------------------------------------------------------------------------------------------

    async def _fabric(self, tenants: Sequence[Tenant]) -> None:
        networks = await NETWORKS.list(self.engine.store)
        ports = [m.instance.port for m in self.supervisor.of(None) if m.instance.port]
        await self._guarded(
            "sweep of networks", asyncio.to_thread(self.engine.fabric.sweep, list(tenants), networks, ports)
        )

        async def ensure(tenant: Tenant) -> None:
            await self._guarded(f"tenant {tenant.name}", self.tenants.ensure(tenant))
            for network in networks:
                if network.tenant == tenant.name:
                    name = f"network {tenant.name}/{network.name}"
                    await self._guarded(name, self.networks.ensure(tenant, network))
            await self._guarded(f"names of tenant {tenant.name}", self.supervisor.launcher.update_names(tenant))

        await asyncio.gather(*(ensure(tenant) for tenant in tenants))

    async def _guarded(self, name: str, work: Awaitable[object]) -> None:
        """`work`; its failure is a problem of this host, not the end of reconciliation."""
        try:
            await work
            self.engine.problems.pop(name, None)
        except (InsulaError, OSError) as error:
            log.error("%s: %s", name, error)
            self.engine.problems[name] = str(error)

    async def repair(self) -> None:
        """Makes networks right again that somebody damaged; changes nothing that is right."""
        await self._fabric(await TENANTS.list(self.engine.store))

    # -- leftovers -------------------------------------------------------------------------------------------------

    async def _sweep(self, ids: Sequence[str]) -> None:
        """Containers, directories and control groups that belong to no instance."""
        runtime, wanted = self.engine.runtime, set(ids)
        for container in set(runtime.ids()) - wanted:
            await self._guarded(f"container {container}", runtime.delete(container))
        present = {path.name for path in self.engine.settings.instances.iterdir()}
        for name in present - wanted:
            await self.supervisor.launcher.remove_directory(name)

    # -- instances -------------------------------------------------------------------------------------------------

    def _adopt(self, member: Member) -> None:
        state = self.engine.runtime.state(member.instance.id)
        assert state is not None
        paused = Cgroup(self.supervisor.launcher.cgroup(member.instance)).frozen()
        self.supervisor.adopt(
            member,
            InstanceStatus(
                state="paused" if paused else "running",
                generation=member.instance.generation,
                pid=state.pid,
                start_time=state.start_time,
                started=state.started or time.time(),
                restarts=member.status.restarts,
                backoff=member.status.backoff,
                resources=member.status.resources,
            ),
        )
        if member.status.resources != member.instance.spec.resources:
            self.supervisor.spawn(limits.repair(self.supervisor, member))

    async def _act(self, member: Member, action: Action) -> None:
        supervisor, instances = self.supervisor, self.instances
        if action not in (Action.ADOPT, Action.RESUME, Action.NOTHING):
            log.info("instance %s/%s: %s", *member.key, action.name.lower())
        async with member.lock:
            if action is Action.REMOVE:
                await supervisor.remove(member)
            elif action is Action.STOP:
                self._adopt(member)
                supervisor.spawn(instances.finish_stop(member))
            elif action in (Action.LAUNCH, Action.REPLACE):
                await supervisor.launcher.clean(member.tenant, member.instance)
                supervisor.spawn(self._launch(member))
            elif action is Action.HARVEST:
                await self._harvest(member)
            elif action is Action.LOST:
                await self._conclude(member, Exit(exit_status=None, finished=time.time()))
            elif action is Action.REBOOTED:
                await self._rebooted(member)
            elif action is Action.RESUME:
                await supervisor.launcher.clean(member.tenant, member.instance)
                supervisor.resume(member)
            elif action is Action.NOTHING:
                await supervisor.launcher.clean(member.tenant, member.instance)

    async def _harvest(self, member: Member) -> None:
        record = await self.engine.runtime.wait(member.instance.id)
        await self._conclude(member, as_exit(record))

    async def _conclude(self, member: Member, ended: Exit, *, restart: bool = True) -> None:
        state = self.engine.runtime.state(member.instance.id)
        before = member.status
        member.status = InstanceStatus(
            state="running",
            generation=member.instance.generation,
            started=(state.started if state else None) or before.started,
            restarts=before.restarts,
            backoff=before.backoff,
        )
        await self.supervisor.conclude(member, ended, restart=restart)

    async def _launch(self, member: Member) -> None:
        async with member.lock:
            if not member.gone and member.instance.wanted == "running" and not member.active:
                try:
                    await self.supervisor.launch(member)
                except InsulaError as error:  # as when it shares the processes of one that is not up yet
                    log.warning("instance %s/%s does not start: %s", *member.key, error)
                    self.supervisor.retry(member)

    async def _rebooted(self, member: Member) -> None:
        """The host came up again: what ran has ended with it, and runs again if its policy says so."""
        await self.supervisor.launcher.clean(member.tenant, member.instance)
        if member.status.state not in ("exited", "failed"):
            ended = Exit(exit_status=None, finished=time.time())
            if after_boot(member.instance, started_before=True):
                member.status = InstanceStatus(state="exited", generation=member.instance.generation, exit=ended)
            else:
                await self._conclude(member, ended, restart=False)
        if after_boot(member.instance, started_before=True):
            generation = member.instance.generation + 1
            await self.supervisor.want(member, wanted="running", generation=generation)
            self.supervisor.spawn(self._launch(member))


def _ran(state: State) -> bool:
    return state.executed or state.started is not None
