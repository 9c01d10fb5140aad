"""Reconciliation with injected faults: the control plane in this process, over the real kernel."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from insula.container.service.protocol import MONITOR_PID, ZYGOTE_PID
from insula.control import plane as planes
from insula.control import tasks
from insula.control.identities.authority import OPERATOR
from insula.control.instances import io, lifecycle
from insula.control.instances.controller import InstanceController
from insula.control.instances.drivers.base import CreateOptions
from insula.control.instances.lifecycle import Lifecycle
from insula.control.instances.managed import ManagedInstance
from insula.control.keys import INSTANCES
from insula.control.plane import ControlPlane
from insula.kernel.cgroups import Cgroup
from insula.kernel.cgroups.hierarchy import hierarchy
from insula.model.errors import Conflict, Failed, InsulaError, Unavailable
from insula.model.objects import Instance, InstanceSpec, PublishedPort, Tenant
from insula.model.views import ExecSpec
from insula.network.intent import TenantIntent
from insula.settings import Settings
from insula.store.protocol import Compare, Write
from insula.store.sqlite import SqliteStore
from tests.support.daemon import start_time
from tests.support.machine import Run
from tests.support.planes import NO_TEMPLATE
from tests.support.wait import eventually, until

TENANT = "default"


@pytest.fixture
def settings(run_: Run) -> Iterator[Settings]:
    prefix = run_.next_prefix()
    path = run_.path / prefix
    settings = Settings(path / "root", path / "run", prefix, path / "run" / "insulad.sock", machines=NO_TEMPLATE)
    try:
        yield settings
    finally:
        asyncio.run(take_down(settings))
        for name in (MONITOR_PID, ZYGOTE_PID):
            pid = int((settings.run / name).read_text().split()[0])
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: start_time(pid) is None, f"the process of {name} ends")  # type: ignore[misc]
        shutil.rmtree(path, ignore_errors=True)


async def take_down(settings: Settings) -> None:
    plane = await ControlPlane.open(settings)
    plane.begin()
    await eventually(lambda: looked_at(plane), "every instance was looked at")
    await plane.host.down()
    await plane.close()


async def opened(settings: Settings, body: Callable[[ControlPlane], Awaitable[None]]) -> None:
    plane = await ControlPlane.open(settings)
    try:
        await body(plane)
    finally:
        await plane.close()


def looked_at(plane: ControlPlane) -> bool:
    return all(member.reconciled.is_set() for member in plane.managed.of(None))


def watched(plane: ControlPlane, name: str) -> bool:
    """Whether its end is waited for."""
    managed = plane.managed.find(TENANT, name)
    return managed is not None and managed.hold == "watched"


def run(settings: Settings, body: Callable[[ControlPlane], Awaitable[None]]) -> None:
    asyncio.run(opened(settings, body))


def sleeper(name: str) -> InstanceSpec:
    return InstanceSpec(image="busybox", name=name, command=["sleep", "600"], stop_timeout=0)


async def two_instances(plane: ControlPlane) -> None:
    plane.begin()
    for name in ("first", "second"):
        await plane.instances.run(TENANT, sleeper(name), by=OPERATOR)


def test_an_instance_that_cannot_be_observed_delays_only_itself(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed as before, and marked; a request about it is refused in the end; it is told, and tried again."""
    run(settings, two_instances)
    release, looks = threading.Event(), []
    look = InstanceController._observe

    async def stuck(self: InstanceController, managed: ManagedInstance) -> None:
        looks.append(managed.instance.name)
        if managed.instance.name == "first" and not release.is_set():
            await asyncio.to_thread(release.wait)
        await look(self, managed)

    monkeypatch.setattr(InstanceController, "_observe", stuck)
    monkeypatch.setattr(tasks, "LIMIT", 0.5)
    monkeypatch.setattr(io, "_PATIENCE", 0.1)

    async def body(plane: ControlPlane) -> None:
        assert [view.reconciled for view in await plane.instances.list(TENANT)] == [False, False]
        assert looks == [], "nothing is looked at before it begins"
        with pytest.raises(Unavailable, match="still looking at instance first"):
            await plane.instances.get(TENANT, "first")
        plane.begin()
        assert (await plane.instances.run(TENANT, sleeper("third"), by=OPERATOR)).status.state == "running"
        await eventually(lambda: watched(plane, "second"), "one is adopted")
        name = f"instance {TENANT}/first"
        await eventually(lambda: name in plane.context.problems, "the other is told of")
        assert "takes more than 0.5 s" in plane.context.problems[name]
        states = {view.instance.name: view.status.state for view in await plane.instances.list(TENANT)}
        assert states == {"first": "running", "second": "running", "third": "running"}
        release.set()
        await eventually(lambda: watched(plane, "first"), "it is adopted after all")
        await eventually(lambda: name not in plane.context.problems, "and no problem any more")
        assert looks.count("first") >= 2 and "second" in looks

    run(settings, body)


def test_an_unexpected_error_is_a_problem_and_is_retried(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start, of one instance; it is logged with where it was raised, and tried again."""
    run(settings, two_instances)
    failures = ["injected"]
    adopt = Lifecycle.adopt

    async def failing(self: Lifecycle, managed: ManagedInstance) -> None:
        if managed.instance.name == "first" and failures:
            raise ZeroDivisionError(failures.pop())
        await adopt(self, managed)

    monkeypatch.setattr(Lifecycle, "adopt", failing)

    async def body(plane: ControlPlane) -> None:
        plane.begin()
        await eventually(lambda: watched(plane, "first"), "it is adopted the second time")
        await eventually(lambda: watched(plane, "second"), "and so is the other")

    with caplog.at_level(logging.INFO):
        run(settings, body)
    assert not failures
    [record] = [each for each in caplog.records if each.exc_info and "instance default/first" in each.getMessage()]
    assert record.exc_info and record.exc_info[0] is ZeroDivisionError
    assert "instance default/first: injected" in caplog.text
    assert "instance default/first: solved" in caplog.text


def test_foreign_changes_of_the_host_are_seen_at_the_next_pass(settings: Settings) -> None:
    """A frozen group is told as paused, and nothing is done about it. Records that are gone are no end."""

    async def body(plane: ControlPlane) -> None:
        await two_instances(plane)
        first, second = plane.managed.of(TENANT)
        pids = [each.status.pid for each in (first, second)]
        group = Cgroup(f"{settings.prefix}/{TENANT}/{first.instance.id}")
        for work, state in ((group.freeze, "paused"), (group.thaw, "running")):
            await asyncio.to_thread(work)
            await plane.instance_controller.resync()
            assert [each.status.state for each in (first, second)] == [state, "running"]
        records = settings.run / "containers" / second.instance.id
        await eventually(lambda: gone(records), "its records are gone")  # the zygote may be writing there just now
        await plane.instance_controller.resync()
        assert second.status.state == "running" and [each.status.pid for each in (first, second)] == pids
        assert all(start_time(pid or 0) for pid in pids), "they run"
        await plane.instances.remove(TENANT, "second", force=True)
        assert start_time(pids[1] or 0) is None and start_time(pids[0] or 0)

    run(settings, body)


def test_a_start_that_takes_too_long_fails_and_is_undone(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime can't be interrupted, so it is undone when it has answered; others are served meanwhile."""

    async def body(plane: ControlPlane) -> None:
        await two_instances(plane)
        driver, release = plane.context.drivers["container"], asyncio.Event()
        create = driver.create

        async def slow(tenant: Tenant, instance: Instance, options: CreateOptions) -> None:
            await create(tenant, instance, options)
            if instance.name == "slow":
                await release.wait()

        monkeypatch.setattr(driver, "create", slow)
        with monkeypatch.context() as shorter:
            shorter.setattr(lifecycle, "LIMIT", 0.2)
            with pytest.raises(Failed, match="that takes more than"):
                await plane.instances.run(TENANT, sleeper("slow"), by=OPERATOR)
        managed = plane.managed.find(TENANT, "slow")
        assert managed and managed.status.state == "starting"
        await eventually(lambda: managed.instance.id in driver.ids(), "the runtime has made it")
        assert (await plane.instances.run(TENANT, sleeper("third"), by=OPERATOR)).status.state == "running"
        release.set()
        await eventually(lambda: managed.status.state == "failed", "its start is given up")
        await eventually(lambda: managed.instance.id not in driver.ids(), "nothing is left of it")
        assert "more than 0.2 s" in (managed.status.error or "")
        assert (await plane.instances.start(TENANT, "slow", by=OPERATOR)).status.state == "running", "it can be started"
        timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        assert not [each for each in timers if "give_up" in repr(each) and not each.cancelled()], (
            "none is given up later"
        )

    run(settings, body)


def test_what_a_start_needs_may_take_longer_than_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may have to be copied first: that is no part of the time for a start, which the test above is about."""

    async def body(plane: ControlPlane) -> None:
        driver, release = plane.context.drivers["container"], asyncio.Event()

        async def slow(tenant: Tenant, instance: Instance) -> None:
            if instance.name == "slow":
                await release.wait()

        monkeypatch.setattr(driver, "prepare", slow)
        monkeypatch.setattr(lifecycle, "LIMIT", 5.0)
        starting = asyncio.create_task(plane.instances.run(TENANT, sleeper("slow"), by=OPERATOR))
        await eventually(lambda: plane.managed.find(TENANT, "slow"), "it is committed")
        assert (await plane.instances.run(TENANT, sleeper("beside"), by=OPERATOR)).status.state == "running"
        await asyncio.sleep(5.5)
        assert not starting.done()
        release.set()
        assert (await starting).status.state == "running"

    run(settings, body)


def test_features_that_a_driver_lacks_are_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(plane: ControlPlane) -> None:
        await two_instances(plane)
        verbs = plane.instances

        async def drain(pieces: AsyncIterator[object]) -> None:
            async for _ in pieces:
                pass

        async def attach() -> None:
            async with verbs.attach(TENANT, "first"):
                pass

        asked: dict[str, Callable[[], Awaitable[object]]] = {
            "exec": lambda: verbs.exec_create(TENANT, "first", ExecSpec(command=["true"])),
            "attach": attach,
            "files": lambda: drain(verbs.archive_get(TENANT, "first", "/etc")),
            "stats": lambda: drain(plane.stats.of(TENANT, ["first"])),
            "processes": lambda: verbs.processes(TENANT, "first"),
            "explain": lambda: verbs.explain(TENANT, "first"),
            "pause": lambda: verbs.pause(TENANT, "first"),
        }
        driver = plane.context.drivers["container"]
        with monkeypatch.context() as lesser:
            lesser.setattr(driver, "features", frozenset())
            for feature, ask in asked.items():
                with pytest.raises(Conflict, match=f"instances of kind container have no {feature}"):
                    await ask()
            assert (await verbs.run(TENANT, sleeper("third"), by=OPERATOR)).status.state == "running"
            await drain(plane.stats.of(TENANT))
        for ask in asked.values():
            await ask()
        others = {"memory-events", "hotplug"}  # no verb asks for the one, and containers all have the other
        assert set(asked) | others == set(driver.features)

    run(settings, body)


def test_records_of_0_1_0_are_taken_over_or_a_problem(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which name no host. All in one transaction; a store that refuses it ends nothing."""

    async def hosts() -> list[str]:
        store = SqliteStore(settings.state)
        found = [instance.host for instance in await INSTANCES.list(store)]
        await store.close()
        return found

    async def forget_host(plane: ControlPlane) -> None:
        await two_instances(plane)
        for managed in plane.managed.of(TENANT):
            old = msgspec.structs.replace(managed.instance, host="")
            await plane.context.store.transact([], [INSTANCES.put(old, *managed.key)])

    run(settings, forget_host)
    assert asyncio.run(hosts()) == ["", ""]
    transact, taken = SqliteStore.transact, list[int]()

    async def refuse(
        self: SqliteStore, compares: Sequence[Compare], writes: Sequence[Write], *, durable: bool = True
    ) -> int:
        if sum(write.key.startswith("/instances/") for write in writes) == 2:
            taken.append(len(taken))
            raise Unavailable("no space is left")
        return await transact(self, compares, writes, durable=durable)

    async def served(plane: ControlPlane) -> None:
        assert ("no space is left" in plane.context.problems.get("records of 0.1.0", "")) is bool(taken)
        plane.begin()
        await eventually(lambda: watched(plane, "first") and watched(plane, "second"), "both run on")
        assert {view.instance.host for view in await plane.instances.list(TENANT)} == {plane.context.host}

    with monkeypatch.context() as full:
        full.setattr(SqliteStore, "transact", refuse)
        run(settings, served)
    assert taken == [0] and asyncio.run(hosts()) == ["", ""]
    taken.clear()
    run(settings, served)
    assert "" not in asyncio.run(hosts())


def test_a_tenant_that_cannot_be_removed_is_a_problem_and_is_retried(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(plane: ControlPlane) -> None:
        plane.begin()
        index = (await plane.tenants.create("other")).tenant.index
        fabric, netns = plane.context.fabric, f"/run/netns/{settings.prefix}-other"
        assert netns in left_of(settings.prefix), "the control"

        def refuse(tenant: Tenant) -> None:
            raise Failed("injected")

        with monkeypatch.context() as broken:
            broken.setattr(fabric, "remove", refuse)
            await plane.tenants.remove("other")
        assert plane.context.problems["tenant other"] == "could not be removed from the host: injected"
        assert netns in left_of(settings.prefix)
        assert (await plane.tenants.create("next")).tenant.index > index, "nobody gets what is still there"
        await plane.network_controller.resync()
        assert netns not in left_of(settings.prefix) and "tenant other" not in plane.context.problems
        await plane.tenants.create("other")
        assert netns in left_of(settings.prefix)
        await plane.tenants.remove("other")
        assert netns not in left_of(settings.prefix)

    run(settings, body)


@pytest.mark.parametrize("where", ["one network", "all of it"])
def test_a_failed_periodic_repair_is_a_problem_and_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    monkeypatch.setattr(planes, "REPAIR_EVERY", 0.05)

    async def body(plane: ControlPlane) -> None:
        await plane.tenants.create("other")
        plane.begin()
        fail, repaired = threading.Event(), []
        name = "tenant other" if where == "one network" else "periodic repair"
        apply, repair = plane.context.fabric.apply, plane.network_controller.resync

        def apply_or_fail(intent: TenantIntent) -> Mapping[str, InsulaError]:
            if fail.is_set() and where == "one network" and intent.tenant.name == "other":
                raise ZeroDivisionError("injected")
            repaired.append(intent.tenant.name)
            return apply(intent)

        async def repair_or_fail() -> None:
            if fail.is_set() and where == "all of it":
                raise ZeroDivisionError("injected")
            await repair()

        monkeypatch.setattr(plane.context.fabric, "apply", apply_or_fail)
        monkeypatch.setattr(plane.network_controller, "resync", repair_or_fail)
        await eventually(lambda: len(repaired) > 4, "the control: it repairs")
        assert name not in plane.context.problems
        fail.set()
        await eventually(lambda: plane.context.problems.get(name) == "injected", "it is told")
        assert f"{name}: injected" in (await plane.host.status()).problems
        count = len(repaired)
        if where == "one network":
            await eventually(lambda: len(repaired) > count + 2, "others are repaired")
        fail.clear()
        await eventually(lambda: name not in plane.context.problems, "it is solved")

    run(settings, body)
    assert "ZeroDivisionError" in caplog.text and "Traceback" in caplog.text


def test_a_resolver_that_died_is_started_again_in_its_tenant_s_control_group(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "REPAIR_EVERY", 0.05)
    pidfile = settings.run / "dns" / TENANT / "pid"

    async def body(plane: ControlPlane) -> None:
        first = int(pidfile.read_text())
        assert in_group(first)
        plane.begin()
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: int(pidfile.read_text()) != first, "another one is there")
        second = int(pidfile.read_text())
        assert in_group(second)
        assert plane.context.fabric.installed((await plane.tenants.find(TENANT)).value).drift == []

    def in_group(pid: int) -> bool:
        """The process is in this group of each controller, and in no other group of the host."""
        lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
        paths = {controllers: path for _, controllers, path in lines}
        wanted = [""] if hierarchy().unified else ["memory", "pids", "freezer"]
        return all(paths[name].endswith(f"/{settings.prefix}/{TENANT}/resolver") for name in wanted)

    run(settings, body)


def test_down_ends_reconciliation_and_late_requests_make_no_network(settings: Settings) -> None:
    """Threads of repairs and of requests that run when everything is taken down can make nothing again."""
    names = [f"t{number}" for number in range(6)]

    async def body(plane: ControlPlane) -> None:
        prefix, fabric = settings.prefix, plane.context.fabric
        for name in names:
            await plane.tenants.create(name)
        tenants = [view.tenant for view in await plane.tenants.list()]
        assert left_of(prefix) >= {f"/run/netns/{prefix}-{name}" for name in names}, "the control"
        plane.begin()
        repair = plane.tasks.spawn(plane.network_controller.resync())
        late = [asyncio.create_task(plane.tenants.create(f"late{number}")) for number in range(6)]
        # their callers are gone
        threads = [asyncio.to_thread(fabric.apply, TenantIntent(tenant=tenant)) for tenant in tenants]
        going_on = asyncio.gather(*threads, return_exceptions=True)
        await asyncio.sleep(0)
        await plane.host.down()
        await asyncio.wait([repair])
        assert not any(managed.busy for managed in plane.network_controller._managed.values())
        ends = [*await asyncio.gather(*late, return_exceptions=True), *await going_on]
        assert all(isinstance(end, Unavailable) for end in ends if isinstance(end, BaseException)), ends
        assert left_of(prefix) == set()
        with pytest.raises(Unavailable, match="shutting down"):
            await plane.tenants.create("later")
        assert (await plane.host.status()).problems[-1] == "networks are being taken down on this host"
        assert left_of(prefix) == set()

    run(settings, body)


def test_an_instance_that_comes_and_goes_has_no_networks_reconciled(settings: Settings) -> None:
    """That would be a multiple of what its own port costs. One pass a minute is about all tenants."""

    async def body(plane: ControlPlane) -> None:
        plane.begin()
        work, count = plane.context.telemetry.networks, 8

        async def once(number: int, **more: object) -> None:
            spec = msgspec.structs.replace(sleeper(f"i{number}"), **more)
            await plane.instances.run(TENANT, spec, by=OPERATOR)
            await plane.instances.remove(TENANT, f"i{number}", force=True)

        await once(0)
        before = work.passes
        for number in range(count):
            await once(number)
        assert work.passes - before < count
        before = work.passes
        await once(0, published=[PublishedPort(port=28080, target=80)])
        await eventually(lambda: work.passes >= before + 2, "the control: ports of the host come and go")

    run(settings, body)


def gone(path: Path) -> bool:
    """Whether there is no such tree, after an attempt to remove it."""
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def left_of(prefix: str) -> set[str]:
    """Namespaces, control groups and uplinks whose names begin so."""
    groups = [*Path("/sys/fs/cgroup").glob(prefix), *Path("/sys/fs/cgroup").glob(f"*/{prefix}")]
    found = [*Path("/run/netns").glob(f"{prefix}-*"), *groups, *Path("/sys/class/net").glob(f"{prefix}-*")]
    return {str(path) for path in found}
