"""`NetworkController`: makes what each tenant has on this host as the store wants it: control group, networks, names.

It is woken at the start of the daemon, once a minute, and by the store, when another daemon changed a tenant or its
networks. Verbs have the same done as soon as they have committed something (`Intents.apply`). Tenants don't wait for
each other. What can't be made is a problem of this host, and is tried again a minute later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from insula.control.context import Context
from insula.control.keys import NETWORKS, TENANTS
from insula.control.networks.intents import Intents
from insula.control.tasks import Tasks
from insula.model.errors import Failed
from insula.model.objects import Tenant
from insula.network.intent import TenantIntent
from insula.store.protocol import Compacted

log = logging.getLogger("insula.reconcile")
LIMIT = 30.0
"""Seconds after which tenants that are still being looked at are a problem."""
_PAUSE = 1.0  # seconds between a change in the store and a look whether this daemon made it, and has carried it out


class NetworkController:
    def __init__(self, context: Context, intents: Intents, tasks: Tasks) -> None:
        self.context = context
        self.intents = intents
        self._tasks = tasks
        self._at_work: dict[str, asyncio.Task[None]] = {}
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
        tenants = await TENANTS.readable(self.context.store)
        waiting = set(self.context.preparing)
        for tenant in tenants:
            self.nudge(tenant)
        if self._at_work:
            _, late = await asyncio.wait(list(self._at_work.values()), timeout=LIMIT)
            if late:
                what = f"{len(late)} tenants are still being looked at after {LIMIT:g} s"
                self.context.problems["networks"] = what
            else:
                self.context.problems.solved("networks")
        for name in waiting:
            self._prepared(name)

    def nudge(self, tenant: Tenant) -> None:
        """Make everything of this tenant right, unless that is being done: one that hangs is not joined by more."""
        if tenant.name in self._at_work or self.context.going_down.is_set():
            return
        task = self._at_work[tenant.name] = self._tasks.spawn(self._work(tenant))
        task.add_done_callback(lambda _: self._at_work.pop(tenant.name))

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
        if self.intents.seen.get(name, 0) < revision and not self.context.going_down.is_set():
            self._tasks.spawn(self._look(name))

    async def _look(self, name: str) -> None:
        """At a tenant that changed, or is gone."""
        with contextlib.suppress(Failed):  # a damaged record; the next start of the daemon tells
            if found := await TENANTS.get(self.context.store, name):
                self.nudge(found.value)
            elif not self.context.unreadable:
                await self.sweep(await TENANTS.list(self.context.store))
                removal = asyncio.to_thread(self.context.groups.remove, name)
                await self.context.problems.guard(f"group of tenant {name}", removal)

    # -- working -----------------------------------------------------------------------------------------------------

    async def sweep(self, tenants: Sequence[Tenant]) -> None:
        """Remove from this host what belongs to none of these tenants, which are all that there are."""
        work = asyncio.to_thread(self.context.fabric.sweep, tenants)
        await self.context.problems.guard("networks of tenants that are gone", work)

    async def _work(self, tenant: Tenant) -> None:
        await self.context.problems.guard(f"networks of tenant {tenant.name}", self._reconcile(tenant))

    async def _reconcile(self, tenant: Tenant) -> None:
        """One tenant. Its lock is held, so that nothing of it changes meanwhile."""
        name = tenant.name
        async with self.context.locks[name]:
            intent = await self.intents.build(tenant)
            if intent is None:  # it was removed
                return
            groups = asyncio.to_thread(self.context.groups.ensure, intent.tenant)
            await self.context.problems.guard(f"limits of tenant {name}", groups)
            await self.context.problems.guard(f"tenant {name}", self._apply(intent))
        self._prepared(name)

    async def _apply(self, intent: TenantIntent) -> None:
        """Have the fabric make it. What can't be made is a problem for each part; raises what all of it fails for."""
        name, problems = intent.tenant.name, self.context.problems
        errors = await asyncio.to_thread(self.context.fabric.apply, intent)
        named = {part: f"{part} of tenant {name}" for part in {*errors, "leftovers", "names"} - {"tenant"}}
        named |= {f"port {port.instance}": f"port of instance {name}/{port.instance}" for port in intent.ports}
        named |= {f"network {network.name}": f"network {name}/{network.name}" for network in intent.networks}
        for part, problem in named.items():
            if error := errors.get(part):
                problems.report(problem, error)
            else:
                problems.solved(problem)
        if error := errors.get("tenant"):
            raise error

    def _prepared(self, tenant: str) -> None:
        """Have those go on who wait for it (`Context.prepared`)."""
        if event := self.context.preparing.pop(tenant, None):
            event.set()

    async def stop(self) -> None:
        """End it, for what is taken down must not be made again. Threads that it has started may run on: the fabric
        waits for those that use it."""
        tasks = [*self._watching, *self._at_work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for name in list(self.context.preparing):
            self._prepared(name)
