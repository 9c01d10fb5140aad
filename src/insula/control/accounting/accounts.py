"""`Accounts`: reads the counters of this host's instances, and stores their totals.

They are read every ten seconds, when somebody asks for them, and when an instance ends: then its processes are killed,
its counters are read and stored, and only after that its control group and its port are removed. If the daemon is
killed in between, the next one reads the same counters again, which adds nothing.

The accounts in memory are the truth; each write has a whole one, and writes are applied in their order. A tenant's lock
is held while its counters are read: an old reading that arrives late would count an earlier incarnation twice. If
neither the processor time nor the memory of a tenant's control group has changed, its instances are not looked at.

The holder of that lock waits for the kernel and the store, never for a verb: not for the end of processes, and not for
the tenant's turn at the fabric, which is taken before the lock. So those who ask for totals wait for no verb either.
Counters of packets are read in such a turn. A reading that doesn't get it leaves them to the next one.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import islice
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from insula.control.accounting import history
from insula.control.accounting.ledger import after_boot, ledger_with, now, read_ledger
from insula.control.accounting.meters import (
    accrue,
    add,
    advance,
    advance_port,
    advance_traffic,
    baseline,
    finish,
    hold,
    sample,
    totals,
    traffic_totals,
)
from insula.control.context import Context
from insula.control.instances.drivers.base import Driver, GroupCounters
from insula.control.instances.managed import ManagedInstance, ManagedInstances
from insula.control.keys import ACCOUNTS, CHECKPOINTS, EGRESS, GROUPS, HISTORIES, LEDGERS, TENANTS, USAGE
from insula.model.accounting import (
    Account,
    Checkpoint,
    MemoryMeter,
    TrafficMeters,
    UsageMeter,
    UsageSnapshot,
    UsedTotals,
)
from insula.model.errors import Failed, InsulaError
from insula.model.objects import Port, Tenant
from insula.model.views import Usage
from insula.network.fabric import Traffic
from insula.store.protocol import Delete, Entry, Put, Store, Write
from insula.store.typed import Keyspace

T = TypeVar("T")
Packets = Mapping[int, Traffic]
"""The traffic of a tenant's instances, by the indices of their ports."""
PROBLEM = "accounting"
PATIENCE = 0.2
"""Seconds that a reading waits for a tenant's turn at the fabric."""
_EMPTY = Account()
_NO_TRAFFIC = TrafficMeters()
_TURN = 64  # accounts that are handled before other tasks may run


class TenantAccounts:
    """One tenant's accounts on this host, by the ids of instances. `unsaved` are those to be written.

    `group` is the processor time of its control group. `seen` are that group's counters at the last reading, and
    `unchanged` is the time until which no counter has changed since then. `egress` is the traffic of pulls and pushes,
    of which `pulls` are at work; `egress_moved` if it may have changed since the last reading.
    """

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.group = UsageMeter()
        self.seen: GroupCounters | None = None
        self.unchanged = 0.0
        self.egress = TrafficMeters()
        self.egress_moved = False
        self.pulls = 0
        self.unsaved: set[str] = set()
        self.group_unsaved = self.egress_unsaved = False
        self.lock = asyncio.Lock()

    def account(self, managed: ManagedInstance) -> Account:
        """The account of an instance; an empty one if it never ran."""
        return self.accounts.get(managed.instance.id, _EMPTY)

    def set(self, instance_id: str, account: Account) -> None:
        if self.accounts.get(instance_id) != account:
            self.accounts[instance_id] = account
            self.unsaved.add(instance_id)

    def set_group(self, group: GroupCounters | None) -> None:
        if group and (after := advance(self.group, group.incarnation, group.cpu)) != self.group:
            self.group, self.group_unsaved = after, True

    def set_egress(self, traffic: Traffic | None) -> None:
        if traffic and (after := advance_traffic(self.egress, traffic)) != self.egress:
            self.egress, self.egress_unsaved = after, True


class Reading(NamedTuple):
    """The counters of a tenant: of its group, and of instances by their ids. `found` is None if nothing has changed."""

    at: float
    group: GroupCounters | None
    found: Mapping[str, GroupCounters | None] | None


class Accounts:
    """The accounts of this host. `managed` are its instances."""

    def __init__(self, context: Context, managed: ManagedInstances) -> None:
        self.context = context
        self.managed = managed
        self._tenants: defaultdict[str, TenantAccounts] = defaultdict(TenantAccounts)

    def of(self, tenant: str) -> TenantAccounts:
        return self._tenants[tenant]

    # -- the daemon's start and end ----------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read what is stored. A damaged record is a problem of this host, and its totals begin anew."""
        store, host = self.context.store, self.context.host
        accounts, groups, egress, ledgers, marks, tenants = await asyncio.gather(
            *(store.list(kind.prefix_all()) for kind in (ACCOUNTS, GROUPS, EGRESS, LEDGERS, CHECKPOINTS, TENANTS))
        )
        checkpoint = dict(self._readable(CHECKPOINTS, marks.entries)).get((host,))
        own = {each.instance.id for each in self.managed.all()}
        for (tenant, instance), account in self._readable(ACCOUNTS, accounts.entries):
            if instance in own or self.managed.complete:
                self.of(tenant).accounts[instance] = account
        for (tenant, where), group in self._readable(GROUPS, groups.entries):
            if where == host:
                self.of(tenant).group = group
        for (tenant, where), meters in self._readable(EGRESS, egress.entries):
            if where == host:
                self.of(tenant).egress = meters
        known = {tenant: ledger for (tenant,), ledger in self._readable(LEDGERS, ledgers.entries)}
        puts: list[Write] = [*after_boot(known.items(), checkpoint)]
        for entry in tenants.entries:
            (name,) = TENANTS.parts(entry.key)
            self.of(name).egress_moved = True  # a pull may have ended with the last daemon
            if name not in known:  # of an earlier version, or damaged
                puts.append(await self._ledger_of_now(name))
            if checkpoint and checkpoint.boot == now().boot:
                self.of(name).unchanged = checkpoint.at
        if puts:
            await store.transact([], puts)

    def _readable(self, kind: Keyspace[T], entries: Iterable[Entry]) -> Iterator[tuple[tuple[str, ...], T]]:
        """Yield the undamaged objects of these entries, with the parts of their keys."""
        for entry in entries:
            try:
                yield kind.parts(entry.key), kind.decode(entry)
            except Failed as error:
                self.context.problems[f"record {entry.key}"] = str(error)

    async def _ledger_of_now(self, tenant: str) -> Put:
        usage = Usage()
        with suppress(Failed):  # damaged; a problem of this host
            if found := await USAGE.get(self.context.store, tenant):
                usage = found.value
        return await ledger_with(self.context.store, tenant, usage)

    async def flush(self) -> None:
        """Read the counters of all instances that run, and store what has changed."""
        running: dict[str, list[ManagedInstance]] = defaultdict(list)
        for managed in self.managed.all():
            if managed.active:
                running[managed.instance.tenant].append(managed)
        pulling = [name for name, mine in self._tenants.items() if mine.pulls or mine.egress_moved]
        for tenant in {**running, **dict.fromkeys(pulling)}:
            await self._read(tenant, running.get(tenant, []))
        await self.save()

    async def save(self) -> None:
        """Store what is unsaved, some at a time. What can't be stored stays unsaved."""
        host, stored = self.context.host, False
        for name, mine in [*self._tenants.items()]:
            while (mine.unsaved or mine.group_unsaved or mine.egress_unsaved) and self._tenants.get(name) is mine:
                await self._save_some(name, mine)
                stored = True
        if stored or len(self.managed):
            moment = now()
            put = CHECKPOINTS.put(Checkpoint(boot=moment.boot, at=moment.at), host)
            await self.context.store.transact([], [put], durable=False)

    async def _save_some(self, name: str, mine: TenantAccounts) -> None:
        taken, group, egress = set(islice(mine.unsaved, _TURN)), mine.group_unsaved, mine.egress_unsaved
        puts = [ACCOUNTS.put(mine.accounts[each], name, each) for each in taken if each in mine.accounts]
        puts += [GROUPS.put(mine.group, name, self.context.host)] if group else []
        puts += [EGRESS.put(mine.egress, name, self.context.host)] if egress else []
        mine.unsaved -= taken
        mine.group_unsaved = mine.egress_unsaved = False
        try:
            await self.context.store.transact([], puts, durable=False)
        except BaseException:
            mine.unsaved |= taken
            mine.group_unsaved |= group
            mine.egress_unsaved |= egress
            raise

    # -- reading -----------------------------------------------------------------------------------------------------

    async def read(self, tenant: str) -> None:
        """Read the counters of a tenant's instances that run. They are stored with the next flush."""
        mine = self.of(tenant)
        mine.egress_moved |= mine.egress != _NO_TRAFFIC  # the last packets may come after the end of a pull
        await self._read(tenant, [each for each in self.managed.of(tenant) if each.active])

    @contextmanager
    def pulling(self, tenant: str) -> Iterator[None]:
        """Read the tenant's counters every ten seconds while the block runs, and once more after it."""
        mine = self.of(tenant)
        mine.pulls += 1
        try:
            yield
        finally:
            mine.pulls -= 1
            mine.egress_moved = True

    async def _read(self, tenant: str, running: Sequence[ManagedInstance]) -> None:
        mine = self.of(tenant)
        async with self.context.turn_within(tenant, PATIENCE) as turn, mine.lock:
            if self._tenants.get(tenant) is not mine:  # it was removed
                return
            drivers = {each.instance.id: driver for each in running if (driver := self._driver(each))}
            seen = mine.seen if drivers.keys() <= mine.accounts.keys() else None
            reading = await asyncio.to_thread(self._measure, tenant, drivers, seen)
            mine.set_group(reading.group)
            if turn and (mine.pulls or mine.egress_moved):
                mine.egress_moved = False
                mine.set_egress(await self._egress(tenant))
            if reading.found is None:
                mine.unchanged = reading.at
                return
            traffic = await self._traffic(running) if turn else {}
            async for each in in_turns(running):
                if each.instance.id in reading.found:
                    self._take(mine, each, reading.found[each.instance.id], traffic, reading.at)
            mine.seen, mine.unchanged = reading.group if turn else None, reading.at

    def _driver(self, managed: ManagedInstance) -> Driver | None:
        driver = self.context.driver(managed.instance)
        return driver if "stats" in driver.features else None

    def _measure(self, tenant: str, drivers: Mapping[str, Driver], seen: GroupCounters | None) -> Reading:
        """Read files of control groups. Blocks."""
        group, at = self.context.groups.counters(tenant), now().at
        if group and group == seen:
            return Reading(at, group, None)
        return Reading(at, group, {each: driver.counters(tenant, each) for each, driver in drivers.items()})

    async def _traffic(self, manageds: Collection[ManagedInstance]) -> Packets:
        """The traffic of instances of one tenant, whose turn at the fabric the caller has."""
        ports: list[Port] = [port for each in manageds for port in each.instance.ports]
        if not ports:
            return {}
        owner, fabric = next(iter(manageds)).tenant, self.context.fabric
        try:
            return await asyncio.to_thread(fabric.traffic, owner, ports)
        except (InsulaError, OSError):  # the tenant's network is missing: its controller repairs it
            return {}

    async def _egress(self, tenant: str) -> Traffic | None:
        """The traffic of pulls and pushes through the network of a tenant, whose turn at the fabric the caller has."""
        try:
            if (found := await TENANTS.get(self.context.store, tenant)) is None:
                return None
            return await asyncio.to_thread(self.context.fabric.egress_traffic, found.value)
        except (InsulaError, OSError):
            return None

    def _take(
        self,
        mine: TenantAccounts,
        managed: ManagedInstance,
        group: GroupCounters | None,
        traffic: Packets,
        at: float,
        *,
        over: bool = False,
    ) -> None:
        """Add a reading to the account of an instance. `over`: its processes are dead."""
        after = before = mine.account(managed)
        if group:
            memory = (_finished if over else _sampled)(hold(after.memory, mine.unchanged), managed, group, at)
            after = replace(after, cpu=advance(after.cpu, group.incarnation, group.cpu), memory=memory)
        for port in managed.instance.ports:
            if moved := traffic.get(port.index):
                after = advance_port(after, port.interface, moved)
        if after is not before:
            mine.set(managed.instance.id, after)

    async def settle(self, managed: ManagedInstance) -> None:
        """Kill the processes of an instance, and store its counters; then its control group and its port may be
        removed. If they can't be stored, that is a problem of this host and no error: they are stored later."""
        driver = self._driver(managed)
        if driver is None:
            return
        instance, mine = managed.instance, self.of(managed.instance.tenant)
        if driver.ended(instance) is None:
            await asyncio.to_thread(driver.end, instance)
        async with self.context.turn(instance.tenant), mine.lock:
            group, traffic = driver.counters(instance.tenant, instance.id), await self._traffic([managed])
            if group is None and not traffic:
                return
            self._take(mine, managed, group, traffic, now().at, over=True)
            await self._store(mine, managed)

    async def settle_ports(self, managed: ManagedInstance) -> None:
        """Store what the ports of an instance have moved; then one that sends and receives nothing any more may be
        removed. A failure to store it is no error, as with `settle`."""
        mine = self.of(managed.instance.tenant)
        async with self.context.turn(managed.instance.tenant), mine.lock:
            self._take(mine, managed, None, await self._traffic([managed]), now().at)
            await self._store(mine, managed)

    async def _store(self, mine: TenantAccounts, managed: ManagedInstance) -> None:
        """Store the account of an instance if it has changed."""
        instance = managed.instance
        if instance.id not in mine.unsaved:
            return
        mine.unsaved.discard(instance.id)
        put = ACCOUNTS.put(mine.accounts[instance.id], instance.tenant, instance.id)
        try:
            await self.context.store.transact([], [put], durable=False)
        except InsulaError as error:
            mine.unsaved.add(instance.id)
            self.context.problems.report(PROBLEM, error)

    async def totals(self, tenant: str) -> UsageSnapshot:
        """The tenant's totals on all hosts, as they were last read or stored."""
        mine = self.of(tenant)
        async with mine.lock:
            return await self._totals(tenant, mine)

    async def _totals(self, tenant: str, mine: TenantAccounts) -> UsageSnapshot:
        store = self.context.store
        ledger = accrue(await read_ledger(store, tenant), *now())
        used, group, egress = [ledger.removed], mine.group.total, [mine.egress]
        if not self.managed.complete:
            for (_, instance), account in self._readable(ACCOUNTS, await _entries(store, ACCOUNTS, tenant)):
                used += [totals(account)] if instance not in mine.accounts else []
            for (_, host), meter in self._readable(GROUPS, await _entries(store, GROUPS, tenant)):
                group += meter.total if host != self.context.host else 0
            stored = self._readable(EGRESS, await _entries(store, EGRESS, tenant))
            egress += [meters for (_, host), meters in stored if host != self.context.host]
        used += [totals(each, mine.unchanged) async for each in in_turns([*mine.accounts.values()])]
        return UsageSnapshot(
            at=time.time(), used=add(used), group=group, images=traffic_totals(egress), reserved=ledger.reserved
        )

    # -- instances and tenants come and go ---------------------------------------------------------------------------

    def baseline(self, driver: Driver, tenant: str, instance_id: str) -> Account | None:
        """The account of an instance whose control group is there already, with a container that was prepared before:
        what that has used is the host's. None for others."""
        if "stats" not in driver.features or (group := driver.counters(tenant, instance_id)) is None:
            return None
        return Account(cpu=baseline(group.incarnation, group.cpu))

    def begin(self, tenant: str, instance_id: str, account: Account) -> None:
        """Know the account of a new instance, which was stored with it."""
        self.of(tenant).accounts[instance_id] = account

    @asynccontextmanager
    async def closing(self, tenant: str, instance_id: str) -> AsyncIterator[UsedTotals | None]:
        """Yield the totals of an instance, or None, while they are moved to the tenant's ledger in a transaction that
        deletes the account. Nothing else is read or stored of that tenant meanwhile."""
        mine = self.of(tenant)
        async with mine.lock:
            account = mine.accounts.get(instance_id)
            unsaved = instance_id in mine.unsaved
            mine.unsaved.discard(instance_id)
            try:
                yield totals(account) if account else None
            except BaseException:
                if unsaved:
                    mine.unsaved.add(instance_id)
                raise
            mine.accounts.pop(instance_id, None)

    @asynccontextmanager
    async def removing(self, tenant: Tenant) -> AsyncIterator[list[Write]]:
        """Yield the writes of the transaction that removes a tenant: all that is stored of it is deleted, and its last
        totals are kept."""
        name, mine, store = tenant.name, self.of(tenant.name), self.context.store
        async with self.context.turn_within(name, PATIENCE) as turn, mine.lock:
            mine.set_group(await asyncio.to_thread(self.context.groups.counters, name))
            mine.set_egress(await self._egress(name) if turn else None)
            kept = await history.last_totals(store, tenant, await self._totals(name, mine))
            del self._tenants[name]
            try:
                found: list[Write] = [LEDGERS.delete(name), *kept]
                for kind in (ACCOUNTS, GROUPS, EGRESS, HISTORIES):
                    found += [Delete(entry.key) for entry in (await store.list(kind.prefix(name))).entries]
                yield found
            except BaseException:
                self._tenants[name] = mine
                raise


async def in_turns(some: Iterable[T]) -> AsyncIterator[T]:
    """Yield all, and let other tasks run in between: a tenant may have thousands of instances."""
    for number, each in enumerate(some, 1):
        if number % _TURN == 0:
            await asyncio.sleep(0)
        yield each


async def _entries(store: Store, kind: Keyspace[T], tenant: str) -> Sequence[Entry]:
    return (await store.list(kind.prefix(tenant))).entries


def _sampled(meter: MemoryMeter, managed: ManagedInstance, group: GroupCounters, at: float) -> MemoryMeter:
    started = managed.status.started
    return sample(meter, group.incarnation, at, group.memory, time.time() - started if started else 0.0)


def _finished(meter: MemoryMeter, managed: ManagedInstance, group: GroupCounters, at: float) -> MemoryMeter:
    """End the series when the instance has ended, which may have been long before `at`."""
    ended = managed.status.exit.finished if managed.status.exit else time.time()
    ran = ended - managed.status.started if managed.status.started else 0.0
    return finish(meter, group.incarnation, at - max(0.0, time.time() - ended), ran)
