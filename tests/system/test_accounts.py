"""Accounts in a control plane of this process: what is stored when, and what a second reading or a restart adds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import asdict

from insula.control.accounting import history
from insula.control.accounting.accounts import Accounts
from insula.control.identities.authority import OPERATOR
from insula.control.instances.drivers.base import GroupCounters
from insula.control.instances.drivers.container.driver import ContainerDriver
from insula.control.instances.managed import ManagedInstance
from insula.control.keys import ACCOUNTS, CHECKPOINTS, LEDGERS
from insula.control.plane import ControlPlane
from insula.model.accounting import UsedTotals
from insula.model.errors import Failed
from insula.model.objects import Instance, InstanceSpec, NetworkAttachment, Resources
from insula.settings import Settings
from insula.store.sqlite import SqliteStore
from tests.support.machine import Run
from tests.support.wait import eventually, patiently
from tests.system.test_two_planes import end_of

TENANT = "default"
WORK = "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done; ping -c1 -W20 -s100 10.99.0.1; exec sleep 600"
PING = 128


@pytest.fixture(scope="module")
def settings(run_: Run) -> Iterator[Settings]:
    prefix = run_.next_prefix()
    path = run_.path / prefix
    made = Settings(path / "root", path / "run", prefix, path / "run" / "insulad.sock", spares=0)
    yield made

    async def end() -> None:
        async with opened(made) as plane:
            await eventually(lambda: all(m.reconciled.is_set() for m in plane.managed.all()), "all are looked at")
            await plane.host.down()

    asyncio.run(end())
    end_of(made)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[ControlPlane]:
    plane = await ControlPlane.open(settings)
    try:
        plane.begin()
        yield plane
    finally:
        await plane.close()


def on(settings: Settings, body: Callable[[ControlPlane], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with opened(settings) as plane:
            await body(plane)

    asyncio.run(whole())


def worker(name: str, command: str, **more: object) -> InstanceSpec:
    return InstanceSpec(image="busybox", name=name, command=["sh", "-c", command], stop_timeout=0, **more)  # type: ignore[arg-type]


async def used(plane: ControlPlane, name: str) -> UsedTotals:
    await plane.accounting.accounts.read(TENANT)
    return next(each.used for each in (await plane.accounting.of(TENANT)).instances if each.name == name)


async def started(plane: ControlPlane, name: str) -> ManagedInstance:
    """An instance that has worked, has pinged once, and sleeps. Nothing else is counted on its network."""
    if "v4" not in [view.network.name for view in await plane.networks.list(TENANT)]:
        await plane.networks.create(TENANT, "v4", "10.99.0.0/24")
    await plane.instances.run(TENANT, worker(name, WORK, networks=[NetworkAttachment(network="v4")]), by=OPERATOR)
    found = plane.managed.find(TENANT, name)
    assert found
    before = None
    for _ in range(400):
        now = await used(plane, name)
        if now.received == PING and before and before.cpu == now.cpu:
            return found
        before = now
        await asyncio.sleep(0.05)
    raise AssertionError(f"it is not at rest: {before}")


def test_settling_twice_adds_nothing(settings: Settings) -> None:
    """As when a daemon is killed after it has stored the last reading, and before it has removed the control group."""

    async def body(plane: ControlPlane) -> None:
        managed, accounts = await started(plane, "twice"), plane.accounting.accounts
        await accounts.settle(managed)
        first = await ACCOUNTS.get(plane.context.store, TENANT, managed.instance.id)
        assert first and first.value.cpu.total > 0 and first.value.ports["eth0"].sent.total == PING
        assert first.value.memory.over
        again = Accounts(plane.context, plane.managed)
        await again.load()
        await again.settle(managed)
        second = await ACCOUNTS.get(plane.context.store, TENANT, managed.instance.id)
        assert second and second.value.ports == first.value.ports
        assert second.value.cpu.total - first.value.cpu.total < 1_000_000, "but for the last instructions of the dying"
        await eventually(lambda: managed.status.state == "exited" and not managed.busy, "it is cleared away")
        third = await ACCOUNTS.get(plane.context.store, TENANT, managed.instance.id)
        assert third and third.value.cpu.total == second.value.cpu.total
        await plane.instances.remove(TENANT, "twice", force=True)
        assert await ACCOUNTS.get(plane.context.store, TENANT, managed.instance.id) is None

    on(settings, body)


def test_while_nothing_happens_nothing_is_stored_but_the_time(settings: Settings) -> None:
    async def body(plane: ControlPlane) -> None:
        managed, accounts, store = await started(plane, "idle"), plane.accounting.accounts, plane.context.store

        async def quiet() -> bool:
            await accounts.flush()
            before = await store.list("/accounting/")
            await accounts.flush()
            changed = {e.key for e in (await store.list("/accounting/")).entries if e.revision > before.revision}
            assert CHECKPOINTS.key(plane.context.host) in changed, "the control"
            return changed == {CHECKPOINTS.key(plane.context.host)}

        for _ in range(50):  # the tenant's resolver may still work for a moment
            if await quiet():
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("its accounts are stored each time")
        first = (await used(plane, "idle")).memory_sampled
        await asyncio.sleep(0.3)
        await accounts.flush()
        assert (await used(plane, "idle")).memory_sampled >= first + 0.3, "its memory is counted all the same"
        await plane.instances.remove(TENANT, managed.instance.name, force=True)

    on(settings, body)


def test_a_daemon_goes_on_where_the_one_before_has_ended(settings: Settings) -> None:
    seen: list[UsedTotals] = []

    async def first(plane: ControlPlane) -> None:
        await started(plane, "stays")
        seen.append(await used(plane, "stays"))

    async def second(plane: ControlPlane) -> None:
        await eventually(lambda: all(m.reconciled.is_set() for m in plane.managed.all()), "it was looked at")
        now = await used(plane, "stays")
        assert (now.sent, now.received) == (seen[0].sent, seen[0].received)
        assert seen[0].cpu == now.cpu
        assert now.memory >= seen[0].memory and now.memory_unsampled >= seen[0].memory_unsampled
        await plane.instances.remove(TENANT, "stays", force=True)

    on(settings, first)
    on(settings, second)


def test_reservations_are_written_with_what_reserves(settings: Settings) -> None:
    async def body(plane: ControlPlane) -> None:
        store = plane.context.store

        async def ledger() -> tuple[int, float, int]:
            found = await LEDGERS.get(store, TENANT)
            assert found
            return found.value.instances, found.value.cpus, found.value.memory

        assert await ledger() == (0, 0.0, 0)
        resources = Resources(cpus=0.5, memory=64 << 20)
        await plane.instances.run(TENANT, worker("r", "exec sleep 600", resources=resources), by=OPERATOR)
        assert await ledger() == (1, 0.5, 64 << 20)
        await plane.instances.remove(TENANT, "r", force=True)
        assert await ledger() == (0, 0.0, 0)

    on(settings, body)


def test_hours(settings: Settings) -> None:
    """A snapshot when an hour has begun, from which `since` counts."""

    async def body(plane: ControlPlane) -> None:
        await started(plane, "hours")
        await plane.accounting._periodic()
        whole = await plane.accounting.of(TENANT)
        then = await history.before(plane.context.store, TENANT, time.time())
        assert then and then.used.sent == whole.used.sent > 0
        found = await plane.accounting.of(TENANT, since=time.time())
        assert found.since == then.at
        assert (found.used.sent, found.used.received) == (0, 0) and found.used.cpu < whole.used.cpu
        assert found.reserved.instances == pytest.approx(found.until - found.since, abs=1.0)
        early = await plane.accounting.of(TENANT, since=then.at - 1)
        assert early.used.sent == whole.used.sent, "there is no earlier one"
        await plane.accounting._periodic()
        assert await history.before(plane.context.store, TENANT, time.time()) == then, "one for each hour"
        await plane.instances.remove(TENANT, "hours", force=True)

    on(settings, body)


def test_a_full_disk_holds_nothing_up(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be stored is a problem of the host; it is stored later, and the instance ends all the same."""

    async def body(plane: ControlPlane) -> None:
        managed, accounts, store = await started(plane, "full"), plane.accounting.accounts, plane.context.store

        async def refuse(*_: object, **__: object) -> int:
            raise Failed("the disk that holds the state is full", "free some space")

        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "transact", refuse)
            await accounts.settle(managed)
        assert plane.context.problems["accounting"]
        before = await ACCOUNTS.get(store, TENANT, managed.instance.id)
        await accounts.save()
        after = await ACCOUNTS.get(store, TENANT, managed.instance.id)
        assert after and after.value.memory.over and (before is None or not before.value.memory.over)
        await plane.instances.remove(TENANT, "full", force=True)

    on(settings, body)


async def answered(plane: ControlPlane, tenant: str) -> None:
    """Metrics and usage, of a tenant and of all, answer while somebody else holds that tenant up."""
    async with asyncio.timeout(patiently(10)):
        assert tenant in {each.tenant.name for each in await plane.accounting.figures()}
        assert (await plane.accounting.figures(tenant))[0].totals.used.cpu > 0
        assert (await plane.accounting.of(tenant)).used.cpu > 0
        assert tenant in {each.tenant for each in await plane.accounting.all()}


def test_neither_a_slow_end_nor_a_slow_network_delays_metrics_and_usage(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of processes is paused, and then the tenant's turn at the fabric is taken, as by a slow verb."""
    begun, go_on = threading.Event(), threading.Event()
    real = ContainerDriver.end

    def slow(driver: ContainerDriver, instance: Instance) -> GroupCounters | None:
        begun.set()
        assert go_on.wait(patiently(60))
        return real(driver, instance)

    async def body(plane: ControlPlane) -> None:
        managed = await started(plane, "slow")
        before = await used(plane, "slow")
        monkeypatch.setattr(ContainerDriver, "end", slow)
        settling = asyncio.create_task(plane.accounting.accounts.settle(managed))
        try:
            assert await asyncio.to_thread(begun.wait, patiently(30)), "the instance is being ended"
            await answered(plane, TENANT)
            assert not settling.done()
        finally:
            go_on.set()
            await settling
        async with plane.context.locks[TENANT]:
            settling = asyncio.create_task(plane.accounting.accounts.settle(managed))
            await answered(plane, TENANT)
            assert not settling.done(), "its packets are read in the tenant's turn"
        await settling
        after = await used(plane, "slow")
        assert after.cpu >= before.cpu and after.sent == before.sent == PING, "nothing is lost"
        await plane.instances.remove(TENANT, "slow", force=True)

    on(settings, body)


def test_totals_never_fall(settings: Settings) -> None:
    """Neither while instances end and are removed, nor when they are read at the same time."""

    async def body(plane: ControlPlane) -> None:
        highest, ended = dict[str, float](), False

        async def watch() -> int:
            rounds = 0
            while not ended:
                if rounds % 2:
                    await plane.accounting.accounts.read(TENANT)
                totals = (await plane.accounting.figures(TENANT))[0].totals
                now = {**asdict(totals.used), **asdict(totals.reserved), "group": totals.group}
                assert {name for name, value in now.items() if value < highest.get(name, 0)} == set()
                highest.update(now)
                rounds += 1
                await asyncio.sleep(0.001)
            return rounds

        watching = asyncio.create_task(watch())
        for number in range(5):
            name = f"short{number}"
            await plane.instances.run(TENANT, worker(name, "i=0; while :; do i=$((i+1)); done"), by=OPERATOR)
            await asyncio.sleep(0.1)
            await plane.instances.remove(TENANT, name, force=True)
        ended = True
        assert await watching > 20
        assert highest["cpu"] > 0 and highest["instances"] > 0

    on(settings, body)
