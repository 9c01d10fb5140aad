"""`Accounting`: `insula usage`, and the periodic reading behind it."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from msgspec.structs import replace

from insula.control.accounting import history
from insula.control.accounting.accounts import PROBLEM, Accounts, in_turns
from insula.control.accounting.ledger import read_ledger
from insula.control.accounting.meters import INTERVAL, totals
from insula.control.context import Context
from insula.control.instances.managed import ManagedInstance, ManagedInstances
from insula.control.keys import REMOVED, TENANTS
from insula.control.tenants import Tenants
from insula.model.accounting import InstanceUsage, TenantUsage, UsageSnapshot, UsedTotals
from insula.model.objects import Tenant
from insula.model.views import Usage


class TenantFigures(NamedTuple):
    """A tenant's figures for metrics, as they were last read. `used` are its instances' totals by name, `memory` what
    they use now, in bytes, and `running` how many run."""

    tenant: Tenant
    reserved: Usage
    totals: UsageSnapshot
    used: Mapping[str, UsedTotals]
    memory: int
    running: int


class Accounting:
    """The verbs. `accounts` are those of this host."""

    def __init__(self, context: Context, managed: ManagedInstances, accounts: Accounts, tenants: Tenants) -> None:
        self.context = context
        self.managed = managed
        self.accounts = accounts
        self.tenants = tenants
        self._hour = 0

    # -- periodically ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read and store all counters every ten seconds, without end. A failure is a problem of this host."""
        while True:
            await asyncio.sleep(INTERVAL)
            await self.context.problems.guard(PROBLEM, self._periodic())

    async def _periodic(self) -> None:
        await self.accounts.flush()
        if (hour := int(time.time() // history.HOUR)) != self._hour:
            for tenant in await TENANTS.readable(self.context.store):
                snapshot = await self.accounts.totals(tenant.name)
                last = await history.before(self.context.store, tenant.name, snapshot.at)
                if last is None or replace(last, at=snapshot.at) != snapshot:
                    await history.append(self.context.store, tenant.name, snapshot)
            self._hour = hour

    async def close(self) -> None:
        """Read and store all counters once more. A failure is a problem of this host."""
        await self.context.problems.guard(PROBLEM, self.accounts.flush())

    # -- verbs -------------------------------------------------------------------------------------------------------

    async def of(self, name: str, since: float | None = None) -> TenantUsage:
        """What a tenant has used and reserved since the last snapshot before a time, or since it was created; with its
        instances. NotFound."""
        usage = await self._usage((await self.tenants.find(name)).value, since)
        mine = self.accounts.of(name)
        own = [
            InstanceUsage(name=managed.instance.name, used=totals(mine.account(managed), mine.unchanged))
            async for managed in in_turns(self.managed.of(name))
        ]
        return replace(usage, instances=own)

    async def all(self, since: float | None = None, among: Iterable[str] | None = None) -> list[TenantUsage]:
        """The same of several tenants, or of all for None, without their instances."""
        if among is None:
            return [await self._usage(each, since) for each in await TENANTS.readable(self.context.store)]
        found = [await TENANTS.get(self.context.store, name) for name in sorted(among)]
        return [await self._usage(each.value, since) for each in found if each]

    async def removed(self, since: float | None = None) -> list[TenantUsage]:
        """What removed tenants have used and reserved, the first removed first; of those removed since a time."""
        return [each for each in await REMOVED.readable(self.context.store) if each.until >= (since or 0.0)]

    async def figures(self, name: str | None = None) -> list[TenantFigures]:
        """The figures of one tenant, or of all for None, the oldest first, as they were last read. NotFound."""
        if name is not None:
            return [await self._figures((await self.tenants.find(name)).value, [*self.managed.of(name)])]
        tenants = sorted(await TENANTS.readable(self.context.store), key=lambda tenant: tenant.created)
        instances = defaultdict[str, list[ManagedInstance]](list)
        async for managed in in_turns(self.managed.all()):
            instances[managed.instance.tenant].append(managed)
        return [await self._figures(each, instances[each.name]) async for each in in_turns(tenants)]

    async def _figures(self, tenant: Tenant, instances: Iterable[ManagedInstance]) -> TenantFigures:
        totals_now = await self.accounts.totals(tenant.name)
        ledger = await read_ledger(self.context.store, tenant.name)
        mine = self.accounts.of(tenant.name)
        used, memory, running = dict[str, UsedTotals](), 0, 0
        async for managed in in_turns(instances):
            account = mine.account(managed)
            used[managed.instance.name] = totals(account, mine.unchanged)
            memory += 0 if account.memory.over else account.memory.used
            running += managed.active
        reserved = Usage(instances=ledger.instances, cpus=ledger.cpus, memory=ledger.memory)
        return TenantFigures(tenant, reserved, totals_now, used, memory, running)

    async def _usage(self, tenant: Tenant, since: float | None) -> TenantUsage:
        await self.accounts.read(tenant.name)
        until, begun = await self.accounts.totals(tenant.name), UsageSnapshot(at=tenant.created)
        if since is not None and since > tenant.created:
            begun = await history.before(self.context.store, tenant.name, min(since, until.at)) or begun
        return history.between(tenant, begun, until)
