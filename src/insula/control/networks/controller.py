"""`NetworkController`: makes each tenant's control group, networks and names on this host match the store.

It looks at a tenant when a verb has committed a change (`nudge`), when another daemon has changed the tenant or its
networks in the store, once a minute, and when the daemon starts. Each time it reads the store and applies all of the
tenant's desired state. A tenant that is no longer in the store is removed from the host.

Each tenant has one worker at a time, and workers don't wait for each other. A failure is recorded as a problem of this
host, and is tried again a minute later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence

from insula.control.context import Context, going_down
from insula.control.keys import (
    ADDRESS_GROUPS,
    ENDPOINTS,
    FLOATING_IPS,
    GUARANTEES,
    LOAD_BALANCERS,
    NETWORKS,
    PEERINGS,
    POLICIES,
    ROUTERS,
    TENANTS,
)
from insula.control.networks.intents import Intents
from insula.control.tasks import Tasks
from insula.model.errors import InsulaError, NotFound
from insula.model.objects import Instance, Tenant
from insula.network.fabric import Places
from insula.network.intent import TenantIntent
from insula.store.protocol import Compacted

log = logging.getLogger("insula.reconcile")
LIMIT = 30.0
"""Seconds after which a tenant whose worker still runs is a problem."""
_PAUSE = 1.0  # seconds from a change in the store until the check whether this daemon has applied it already

Errors = Mapping[str, Exception]
"""Failures by part: "limits" (of the control group), "all" (none of the networks can be made), or a part that
`Fabric.apply` names."""


class ManagedTenant:
    """One tenant's name on this host. `here` is the tenant that something was made for; another tenant may have taken
    its name since then."""

    def __init__(self) -> None:
        self.here: Tenant | None = None
        self.wake = False  # something changed since the store was read
        self.worker: asyncio.Task[None] | None = None
        self.waiters: list[asyncio.Future[Errors]] = []
        self.problems: set[str] = set()  # those found by the last pass

    @property
    def busy(self) -> bool:
        return self.worker is not None and not self.worker.done()


class NetworkController:
    def __init__(self, context: Context, intents: Intents, tasks: Tasks) -> None:
        self.context = context
        self.intents = intents
        self._tasks = tasks
        self._managed: dict[str, ManagedTenant] = {}
        self._watching: list[asyncio.Task[None]] = []

    # -- triggers --------------------------------------------------------------------------------------------------

    async def begin(self, revision: int) -> None:
        """Reconcile all tenants, and from now on each one that changes in the store after `revision`."""
        kinds = (
            *(TENANTS, NETWORKS, ROUTERS, POLICIES, ADDRESS_GROUPS, PEERINGS, ENDPOINTS, GUARANTEES),
            *(FLOATING_IPS, LOAD_BALANCERS),
        )
        for prefix in [kind.prefix_all() for kind in kinds]:
            self._watching.append(self._tasks.spawn(self._watch(prefix, revision)))
        await self.resync()

    async def resync(self) -> None:
        """Reconcile all tenants; correct state is left alone. Return after `LIMIT` seconds at the latest; a worker that
        takes longer goes on in the background."""
        names = {tenant.name for tenant in await TENANTS.readable(self.context.store)}
        waiting = set(self.context.preparing)
        for name in {*names, *self._managed}:
            self.nudge(name)
        if workers := [managed.worker for managed in self._managed.values() if managed.worker and managed.busy]:
            _, late = await asyncio.wait(workers, timeout=LIMIT)
            if late:
                what = f"{len(late)} tenants are still being reconciled after {LIMIT:g} s"
                self.context.problems["networks"] = what
            else:
                self.context.problems.solved("networks")
        for name in waiting:
            self._prepared(name)

    def nudge(self, name: str) -> None:
        """Have this tenant reconciled; once more if its worker is busy. A tenant never has two workers."""
        if self.context.going_down.is_set():
            return
        managed = self._managed.setdefault(name, ManagedTenant())
        managed.wake = True
        if not managed.busy:
            managed.worker = self._tasks.spawn(self._work(name, managed))

    def changed(self, name: str) -> None:
        """An instance of this tenant has started or ended, or has other labels: balancers may have other backends."""
        if name in self.intents.balanced:
            self.nudge(name)

    def started(self, name: str) -> None:
        """An instance of this tenant has started: its control group gets what it is promised, if any of them is."""
        floors = self.intents.floors.get(name)
        if floors and any(each.cpus or each.memory for each in floors.instances.values()):
            self.nudge(name)
        self.changed(name)

    async def converged(self, name: str) -> Errors:
        """Wait until this tenant's state matches the store as it is now. Return the failures by part.

        NotFound if the tenant is no longer in the store; then its worker has removed it from this host or has
        recorded why it could not.
        """
        self.context.refuse_if_going_down()
        self.nudge(name)
        answer: asyncio.Future[Errors] = asyncio.get_running_loop().create_future()
        self._managed[name].waiters.append(answer)
        return await answer

    @property
    def queue(self) -> int:
        """How many tenants are being reconciled."""
        return sum(managed.busy for managed in self._managed.values())

    def is_here(self, tenant: Tenant) -> bool:
        """Whether something of this tenant may still be on this host."""
        managed = self._managed.get(tenant.name)
        return managed is not None and managed.here is not None and managed.here.index == tenant.index

    async def _watch(self, prefix: str, revision: int) -> None:
        """Reconcile tenants when other daemons commit changes below `prefix`."""
        while True:
            try:
                async for event in self.context.store.watch(prefix, revision):
                    revision = event.revision
                    asyncio.get_running_loop().call_later(
                        _PAUSE, self._nudge_if_stale, event.entry.key.split("/")[2], revision
                    )
                return  # the store is closed
            except Compacted:
                revision = (await self.context.store.list(prefix)).revision
                await self.resync()
            except Exception as error:
                self.context.problems.report("changes of networks", error)
                await asyncio.sleep(_PAUSE)

    def _nudge_if_stale(self, name: str, revision: int) -> None:
        if self.intents.seen.get(name, 0) < revision:
            self.nudge(name)

    # -- workers -----------------------------------------------------------------------------------------------------

    def know(self, tenants: Iterable[Tenant]) -> None:
        """Record the tenants that were in the store at start; an earlier daemon may have made something for them."""
        for tenant in tenants:
            self._managed.setdefault(tenant.name, ManagedTenant()).here = tenant

    async def sweep(self, tenants: Sequence[Tenant]) -> None:
        """Remove networks from this host that belong to none of `tenants`, which are all tenants of the store."""
        work = asyncio.to_thread(self.context.fabric.sweep, tenants)
        await self.context.problems.guard("networks of removed tenants", work)

    async def _work(self, name: str, managed: ManagedTenant) -> None:
        """Reconcile until nothing has changed meanwhile. Answer the waiters that were there before each pass."""
        while managed.wake:
            managed.wake, asked = False, len(managed.waiters)
            found: Errors | Exception
            try:
                with self.context.telemetry.networks.one(NotFound):
                    found = await self._reconcile(name, managed)
                self.context.telemetry.networks.failures += bool(found)
                self.context.problems.solved(f"networks of tenant {name}")
            except NotFound as error:
                found = error
            except Exception as error:
                found = error
                self.context.problems.report(f"networks of tenant {name}", error)
            self._prepared(name)
            waiters, managed.waiters = managed.waiters[:asked], managed.waiters[asked:]
            _answer(waiters, found)
        if managed.here is None:
            self._managed.pop(name, None)

    async def _reconcile(self, name: str, managed: ManagedTenant) -> Errors:
        """Reconcile one tenant under its lock, so that nothing else changes it. NotFound if it was removed."""
        async with self.context.locks[name]:
            intent = await self.intents.build(name)
            if managed.here and (intent is None or intent.tenant.index != managed.here.index):
                await self._remove(managed, managed.here)
            if intent is None:
                self._report(managed, {})
                raise NotFound(f"there is no tenant {name}", "`insula tenant ls` lists them")
            managed.here = intent.tenant
            errors = await self._make(intent)
        self._report(managed, {_problem(intent.tenant.name, part): error for part, error in errors.items()})
        return errors

    async def _make(self, intent: TenantIntent) -> Errors:
        errors: dict[str, Exception] = {}
        try:
            await asyncio.to_thread(self.context.groups.ensure, intent.tenant)
            if floors := self.intents.floors.get(intent.tenant.name):
                await asyncio.to_thread(self.context.groups.promise, intent.tenant.name, floors)
        except Exception as error:
            errors["limits"] = error
        try:
            errors |= await asyncio.to_thread(self.context.fabric.apply, intent)
            errors |= await self._route(intent)
        except Exception as error:
            errors["all"] = error
        return errors

    async def _route(self, intent: TenantIntent) -> Errors:
        """Have running instances with several ports know what routers lead to. Return the failures by part."""
        networks = {network.name: network for network in intent.networks}
        errors: dict[str, Exception] = {}
        for instance in self.intents.with_several_ports(intent.tenant.name):
            places = [(networks[port.network], port) for port in instance.plugged if port.network in networks]
            try:
                await asyncio.to_thread(self._route_inside, intent.tenant, instance, places)
            except InsulaError as error:
                errors[f"port {instance.name}"] = error
        return errors

    def _route_inside(self, tenant: Tenant, instance: Instance, places: Places) -> None:
        """Open and close the nic in one thread, which goes on if its caller is cancelled."""
        with contextlib.suppress(NotFound):  # it has just ended
            nic = self.context.driver(instance).nic(instance.id)
            try:
                self.context.fabric.route(tenant, nic, places)
            finally:
                nic.close()

    async def _remove(self, managed: ManagedTenant, tenant: Tenant) -> None:
        """Remove a tenant from the host. A failure is recorded as a problem and tried again a minute later."""
        problem = f"tenant {tenant.name}"
        try:
            try:
                await asyncio.to_thread(self.context.fabric.remove, tenant)
            finally:
                await asyncio.to_thread(self.context.groups.remove, tenant.name)
        except (InsulaError, OSError) as error:
            self.context.problems[problem] = f"could not be removed from the host: {error}"
            return
        managed.here = None
        self.context.problems.solved(problem)

    def _report(self, managed: ManagedTenant, found: Mapping[str, Exception]) -> None:
        """Record the problems that were found, and clear those that are solved."""
        for problem, error in found.items():
            self.context.problems.report(problem, error)
        for problem in managed.problems - found.keys():
            self.context.problems.solved(problem)
        managed.problems = set(found)

    def _prepared(self, tenant: str) -> None:
        """Wake those that wait for this tenant in `Context.prepared`."""
        if event := self.context.preparing.pop(tenant, None):
            event.set()

    async def stop(self) -> None:
        """Stop the controller, so that nothing is made again that is being removed. Threads that it has started may run
        on; the fabric waits for those that use it."""
        workers = [managed.worker for managed in self._managed.values() if managed.worker]
        tasks = [*self._watching, *workers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for managed in self._managed.values():
            _answer(managed.waiters, going_down())
            managed.waiters = []
        for name in list(self.context.preparing):
            self._prepared(name)


def _answer(waiters: Iterable[asyncio.Future[Errors]], found: Errors | Exception) -> None:
    for waiter in waiters:
        if waiter.done():  # the waiting task was cancelled
            continue
        if isinstance(found, Exception):
            waiter.set_exception(found)
        else:
            waiter.set_result(found)


def _problem(tenant: str, part: str) -> str:
    """The name under which a failure of this part is recorded as a problem."""
    kind, _, name = part.partition(" ")
    if kind == "port":
        return f"port of instance {tenant}/{name}"
    if kind == "network":
        return f"network {tenant}/{name}"
    return f"tenant {tenant}" if part in ("all", "tenant") else f"{part} of tenant {tenant}"
