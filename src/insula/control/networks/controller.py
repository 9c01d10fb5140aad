"""`NetworkController`: makes what each tenant has on this host as the store wants it: control group, networks, names.

It is woken for one tenant by a verb that committed something (`nudge`), by the store, when another daemon changed the
tenant or its networks, once a minute, and by the start of the daemon. Each time it reads the store, and makes all of
the tenant so; a tenant that is not in the store any more is taken off the host.

One worker at a time serves a tenant, and none waits for another. What can't be made is a problem of this host, and is
tried again a minute later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence

from insula.control.context import Context, going_down
from insula.control.keys import NETWORKS, TENANTS
from insula.control.networks.intents import Intents
from insula.control.tasks import Tasks
from insula.model.errors import InsulaError, NotFound
from insula.model.objects import Tenant
from insula.network.intent import TenantIntent
from insula.store.protocol import Compacted

log = logging.getLogger("insula.reconcile")
LIMIT = 30.0
"""Seconds after which tenants that are still being looked at are a problem."""
_PAUSE = 1.0  # seconds between a change in the store and a look whether this daemon made it, and has carried it out

Errors = Mapping[str, Exception]
"""What can't be made, by the part that it belongs to: "limits" (of the control group), "all" (nothing of the networks
can be made), or one that `Fabric.apply` returns."""


class ManagedTenant:
    """One tenant on this host. `here` is the one that something was made for, maybe before another took its name."""

    def __init__(self) -> None:
        self.here: Tenant | None = None
        self.wake = False  # something changed since the store was read
        self.worker: asyncio.Task[None] | None = None
        self.waiters: list[asyncio.Future[Errors]] = []
        self.problems: set[str] = set()  # that were told at the last look

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

    # -- being woken -----------------------------------------------------------------------------------------------

    async def begin(self, revision: int) -> None:
        """Look at everything, and from now on at what changes in the store after `revision`."""
        for prefix in (TENANTS.prefix_all(), NETWORKS.prefix_all()):
            self._watching.append(self._tasks.spawn(self._watch(prefix, revision)))
        await self.look_again()

    async def look_again(self) -> None:
        """Make everything of every tenant right; nothing happens to what is right. Return after `LIMIT` seconds at the
        latest: what hangs goes on behind that."""
        names = {tenant.name for tenant in await TENANTS.readable(self.context.store)}
        waiting = set(self.context.preparing)
        for name in {*names, *self._managed}:
            self.nudge(name)
        if workers := [managed.worker for managed in self._managed.values() if managed.worker and managed.busy]:
            _, late = await asyncio.wait(workers, timeout=LIMIT)
            if late:
                what = f"{len(late)} tenants are still being looked at after {LIMIT:g} s"
                self.context.problems["networks"] = what
            else:
                self.context.problems.solved("networks")
        for name in waiting:
            self._prepared(name)

    def nudge(self, name: str) -> None:
        """Look at this tenant, once more if that is being done: one that hangs is not joined by others."""
        if self.context.going_down.is_set():
            return
        managed = self._managed.setdefault(name, ManagedTenant())
        managed.wake = True
        if not managed.busy:
            managed.worker = self._tasks.spawn(self._work(name, managed))

    async def converged(self, name: str) -> Errors:
        """Have everything of this tenant made as the store wants it now. What can't be made is returned.

        NotFound if there is no such tenant any more: then nothing of it is on this host.
        """
        self.context.check_stays()
        self.nudge(name)
        answer: asyncio.Future[Errors] = asyncio.get_running_loop().create_future()
        self._managed[name].waiters.append(answer)
        return await answer

    def is_here(self, tenant: Tenant) -> bool:
        """Whether something of this tenant may still be on this host."""
        managed = self._managed.get(tenant.name)
        return managed is not None and managed.here is not None and managed.here.index == tenant.index

    async def _watch(self, prefix: str, revision: int) -> None:
        """Changes below `prefix` that other daemons have committed."""
        while True:
            try:
                async for event in self.context.store.watch(prefix, revision):
                    revision = event.revision
                    asyncio.get_running_loop().call_later(
                        _PAUSE, self._begin_look, event.entry.key.split("/")[2], revision
                    )
                return  # the store is closed
            except Compacted:
                revision = (await self.context.store.list(prefix)).revision
                await self.look_again()
            except Exception as error:
                self.context.problems.report("changes of networks", error)
                await asyncio.sleep(_PAUSE)

    def _begin_look(self, name: str, revision: int) -> None:
        if self.intents.seen.get(name, 0) < revision:
            self.nudge(name)

    # -- working -----------------------------------------------------------------------------------------------------

    def know(self, tenants: Iterable[Tenant]) -> None:
        """These were in the store when the daemon started: an earlier one may have made something for them."""
        for tenant in tenants:
            self._managed.setdefault(tenant.name, ManagedTenant()).here = tenant

    async def sweep(self, tenants: Sequence[Tenant]) -> None:
        """Remove from this host what belongs to none of these tenants, which are all that there are."""
        work = asyncio.to_thread(self.context.fabric.sweep, tenants)
        await self.context.problems.guard("networks of tenants that are gone", work)

    async def _work(self, name: str, managed: ManagedTenant) -> None:
        """Look until nothing changed meanwhile, and answer those who had asked before each look."""
        while managed.wake:
            managed.wake, asked = False, len(managed.waiters)
            found: Errors | Exception
            try:
                found = await self._reconcile(name, managed)
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
        """One tenant. Its lock is held, so that nothing of it changes meanwhile. NotFound if it was removed."""
        async with self.context.locks[name]:
            intent = await self.intents.build(name)
            if managed.here and (intent is None or intent.tenant.index != managed.here.index):
                await self._remove(managed, managed.here)
            if intent is None:
                self._tell(managed, {})
                raise NotFound(f"there is no tenant {name}", "`insula tenant ls` lists them")
            managed.here = intent.tenant
            errors = await self._make(intent)
        self._tell(managed, {_problem(intent.tenant.name, part): error for part, error in errors.items()})
        return errors

    async def _make(self, intent: TenantIntent) -> Errors:
        errors: dict[str, Exception] = {}
        try:
            await asyncio.to_thread(self.context.groups.ensure, intent.tenant)
        except Exception as error:
            errors["limits"] = error
        try:
            errors |= await asyncio.to_thread(self.context.fabric.apply, intent)
        except Exception as error:
            errors["all"] = error
        return errors

    async def _remove(self, managed: ManagedTenant, tenant: Tenant) -> None:
        """Take everything of a tenant off the host. What fails is a problem, and is tried again a minute later."""
        problem = f"tenant {tenant.name}"
        try:
            try:
                await asyncio.to_thread(self.context.fabric.remove, tenant)
            finally:
                await asyncio.to_thread(self.context.groups.remove, tenant.name)
        except (InsulaError, OSError) as error:
            self.context.problems[problem] = f"could not be taken off the host: {error}"
            return
        managed.here = None
        self.context.problems.solved(problem)

    def _tell(self, managed: ManagedTenant, found: Mapping[str, Exception]) -> None:
        """What is wrong now, and that what was wrong before is solved."""
        for problem, error in found.items():
            self.context.problems.report(problem, error)
        for problem in managed.problems - found.keys():
            self.context.problems.solved(problem)
        managed.problems = set(found)

    def _prepared(self, tenant: str) -> None:
        """Have those go on who wait for it (`Context.prepared`)."""
        if event := self.context.preparing.pop(tenant, None):
            event.set()

    async def stop(self) -> None:
        """End it, for what is taken down must not be made again. Threads that it has started may run on: the fabric
        waits for those that use it."""
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
        if waiter.done():  # who waited is gone
            continue
        if isinstance(found, Exception):
            waiter.set_exception(found)
        else:
            waiter.set_result(found)


def _problem(tenant: str, part: str) -> str:
    """What a problem with this part is called."""
    kind, _, name = part.partition(" ")
    if kind == "port":
        return f"port of instance {tenant}/{name}"
    if kind == "network":
        return f"network {tenant}/{name}"
    return f"tenant {tenant}" if part in ("all", "tenant") else f"{part} of tenant {tenant}"
