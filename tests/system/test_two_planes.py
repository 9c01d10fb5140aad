"""Two control planes on one store, each with a host's drivers: either commits, and the instance's own acts.

Both run in this process, over the real kernel: they share the store, and the images on the disk, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from insula.container.service.protocol import MONITOR_PID, ZYGOTE_PID
from insula.control.identities.authority import OPERATOR
from insula.control.plane import ControlPlane
from insula.model.errors import Conflict, Failed, InsulaError, NotFound, Unavailable
from insula.model.network_settings import NetworkSettings
from insula.model.objects import ContainerOptions, InstanceSpec, NetworkAttachment
from insula.model.views import ExecSpec, ResourcesPatch
from insula.settings import Settings
from insula.store.sqlite import SqliteStore
from tests.support.daemon import start_time
from tests.support.machine import Run
from tests.support.planes import NO_TEMPLATE
from tests.support.wait import eventually, patiently, until

TENANT = "default"
RANGES = (NetworkSettings(), NetworkSettings(range4="172.20.0.0/16", range6="fd69:6e73:756c:6200::/64"))
Body = Callable[[ControlPlane, ControlPlane], Awaitable[None]]


@pytest.fixture
def hosts(run_: Run) -> Iterator[list[Settings]]:
    """The settings of the hosts a and b, whose images are in one place."""
    found = []
    for name, network in zip("ab", RANGES, strict=True):
        prefix = run_.next_prefix()
        path = run_.path / prefix
        settings = Settings(
            path / "root", path / "run", prefix, path / "run" / "insulad.sock", network=network, machines=NO_TEMPLATE
        )
        settings.make()
        (settings.root / "host").write_text(f"{name}\n")
        found.append(settings)
    found[1].images.symlink_to(found[0].images)
    try:
        yield found
    finally:
        asyncio.run(take_down(found))
        for settings in found:
            end_of(settings)


async def take_down(hosts: list[Settings]) -> None:
    async def body(a: ControlPlane, b: ControlPlane) -> None:
        for plane in (a, b):
            await eventually(lambda plane=plane: looked_at(plane), "every instance was looked at")  # type: ignore[misc]
            await plane.host.down()

    await on(hosts, body)


def end_of(settings: Settings) -> None:
    for name in (MONITOR_PID, ZYGOTE_PID):
        with suppress(FileNotFoundError, ProcessLookupError):
            pid = int((settings.run / name).read_text().split()[0])
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: start_time(pid) is None, f"the {name} ends")  # type: ignore[misc]
    shutil.rmtree(settings.root.parent, ignore_errors=True)


def looked_at(plane: ControlPlane) -> bool:
    return all(managed.reconciled.is_set() for managed in plane.managed.all())


async def on(hosts: list[Settings], body: Body) -> None:
    """`body` with a control plane for each host, on the store of the first."""
    store = SqliteStore(hosts[0].state)
    a = await ControlPlane.open(hosts[0], store)
    b = await ControlPlane.open(hosts[1], store)
    try:
        a.begin()
        b.begin()
        await body(a, b)
    finally:
        await a.close()
        await b.close()
        await store.close()


def run(hosts: list[Settings], body: Body) -> None:
    asyncio.run(on(hosts, body))


def sleeper(name: str) -> InstanceSpec:
    return InstanceSpec(image="busybox", name=name, command=["sleep", "600"], stop_timeout=0)


async def states(plane: ControlPlane) -> dict[str, tuple[str, str]]:
    """The host and the state of every instance."""
    return {v.instance.name: (v.instance.host, v.status.state) for v in await plane.instances.list(None)}


async def stored(plane: ControlPlane) -> None:
    """Return when its statuses are in the store."""
    for managed in plane.managed.all():
        await plane.instance_controller.statuses.saved(managed)


def alive(pid: int | None) -> bool:
    return pid is not None and Path(f"/proc/{pid}").exists()


def test_each_shows_the_instances_of_both(hosts: list[Settings]) -> None:
    async def body(a: ControlPlane, b: ControlPlane) -> None:
        for plane, name in ((a, "at-a"), (b, "at-b")):
            assert (await plane.instances.run(TENANT, sleeper(name), by=OPERATOR)).status.state == "running"
            await stored(plane)
        for plane in (a, b):
            assert await states(plane) == {"at-a": ("a", "running"), "at-b": ("b", "running")}
            assert (await plane.instances.get(TENANT, "at-b")).instance.host == "b"
        assert a.managed.find(TENANT, "at-b") is None and b.managed.find(TENANT, "at-a") is None
        with pytest.raises(Conflict, match="has an instance at-b already"):
            await a.instances.run(TENANT, sleeper("at-b"), by=OPERATOR)

    run(hosts, body)


def test_ports_are_plugged_by_the_daemon_of_the_host(hosts: list[Settings]) -> None:
    """Whoever commits; and it is told when that is done, and what went wrong."""

    async def body(a: ControlPlane, b: ControlPlane) -> None:
        await a.networks.create(TENANT, "more", "10.97.0.0/24")
        await b.instances.run(TENANT, sleeper("at-b"), by=OPERATOR)
        await stored(b)
        found = await a.instances.plug(TENANT, "at-b", NetworkAttachment(network="more", address="10.97.0.9"))
        assert [(port.interface, port.network) for port in found.instance.ports] == [
            ("eth0", "default"),
            ("eth1", "more"),
        ]
        managed = b.managed.find(TENANT, "at-b")
        assert managed and {port.index for port in managed.instance.ports} == {*managed.status.ports}
        with pytest.raises(Conflict, match="taken"):
            attachment = NetworkAttachment(network="more", address="10.97.0.9")
            await a.instances.run(TENANT, sleeper_on("at-a", attachment), by=OPERATOR)
        with pytest.raises(Conflict, match="is used by at-b"):
            await a.networks.remove(TENANT, "more")
        await a.instances.unplug(TENANT, "at-b", "more")
        await eventually(lambda: len(managed.instance.ports) == len(managed.status.ports) == 1, "b has unplugged it")
        await a.networks.remove(TENANT, "more")

    run(hosts, body)


def sleeper_on(name: str, attachment: NetworkAttachment) -> InstanceSpec:
    return msgspec.structs.replace(sleeper(name), networks=[attachment])


def test_usage_is_that_of_both(hosts: list[Settings]) -> None:
    """Each reads its own counters, and finds the other's totals in the store."""

    async def body(a: ControlPlane, b: ControlPlane) -> None:
        for plane, name in ((a, "at-a"), (b, "at-b")):
            await plane.instances.run(TENANT, sleeper(name), by=OPERATOR)
            await plane.accounting.accounts.flush()
        alone = [
            sum(account.cpu.total for account in plane.accounting.accounts.of(TENANT).accounts.values())
            for plane in (a, b)
        ]
        assert all(alone), "each has used something"
        for plane in (a, b):
            found = await plane.accounting.of(TENANT)
            assert found.used.cpu >= sum(alone) and found.used.cpu < 2 * sum(alone)
        await b.instances.remove(TENANT, "at-b", force=True)
        assert (await a.accounting.of(TENANT)).used.cpu >= sum(alone), "also when it is removed"

    run(hosts, body)


def test_a_request_to_one_is_carried_out_by_the_other(hosts: list[Settings]) -> None:
    async def body(a: ControlPlane, b: ControlPlane) -> None:
        first = (await b.instances.run(TENANT, sleeper("web"), by=OPERATOR)).status
        assert alive(first.pid), "the control"
        stopped = await a.instances.stop(TENANT, "web")
        assert (stopped.status.state, stopped.instance.wanted, alive(first.pid)) == ("exited", "stopped", False)
        assert (await b.instances.get(TENANT, "web")).status.state == "exited"
        assert (await a.instances.wait(TENANT, "web")).exit_status == 137
        started = (await a.instances.start(TENANT, "web", by=OPERATOR)).status
        assert started.state == "running" and alive(started.pid)
        assert (await a.instances.pause(TENANT, "web")).status.state == "paused"
        assert (await b.instances.get(TENANT, "web")).status.state == "paused"
        assert (await a.instances.unpause(TENANT, "web")).status.state == "running"
        updated = await a.instances.update(TENANT, "web", ResourcesPatch(pids=77))
        assert updated.status.resources and updated.status.resources.pids == 77
        assert (await a.instances.rename(TENANT, "web", "site")).status.pid == started.pid
        again = (await a.instances.restart(TENANT, "site", by=OPERATOR)).status
        assert again.pid != started.pid and alive(again.pid) and not alive(started.pid)
        await a.instances.remove(TENANT, "site", force=True)
        assert not alive(again.pid) and await b.instances.list(TENANT) == []
        await eventually(lambda: os.listdir(hosts[1].instances) == [], "its files go, too")

    run(hosts, body)


def test_a_failure_of_the_other_is_reported(hosts: list[Settings]) -> None:
    async def body(a: ControlPlane, b: ControlPlane) -> None:
        broken = InstanceSpec(image="busybox", name="broken", command=["no-such-program"])
        await b.instances.run(TENANT, broken, start=False, by=OPERATOR)
        with pytest.raises(Failed, match="cannot execute no-such-program") as refused:
            await a.instances.start(TENANT, "broken", by=OPERATOR)
        assert refused.value.exit_status == 127
        assert (await a.instances.get(TENANT, "broken")).status.state == "failed"
        with pytest.raises(Failed, match="cannot execute no-such-program") as refused:
            await a.instances.wait(TENANT, "broken")
        assert refused.value.exit_status == 127

    run(hosts, body)


def test_an_error_of_the_other_arrives_as_it_was(hosts: list[Settings]) -> None:
    """With its class, which makes the HTTP status."""

    async def body(a: ControlPlane, b: ControlPlane) -> None:
        joins = InstanceSpec(image="busybox", name="joins", options=ContainerOptions(pid_of="nobody"))
        await b.instances.run(TENANT, joins, start=False, by=OPERATOR)
        found = []
        for plane in (b, a):
            with pytest.raises(InsulaError) as refused:
                await plane.instances.start(TENANT, "joins", by=OPERATOR)
            found.append(refused.value.to_dict())
        assert found[0] == found[1] and found[0]["error"] == "NotFound"

    run(hosts, body)


def test_requests_for_the_instances_host_are_refused_elsewhere(hosts: list[Settings]) -> None:
    async def body(a: ControlPlane, b: ControlPlane) -> None:
        await b.instances.run(TENANT, sleeper("web"), by=OPERATOR)
        with pytest.raises(Unavailable, match="instance web is on host b"):
            await a.instances.exec_create(TENANT, "web", ExecSpec(command=["true"]))
        with pytest.raises(Unavailable, match="instance web is on host b"):
            await a.instances.kill(TENANT, "web")
        exec_id = await b.instances.exec_create(TENANT, "web", ExecSpec(command=["true"]))
        assert (await b.instances.exec_wait(TENANT, "web", exec_id)).exit_status == 0, "the control"
        with pytest.raises(NotFound):
            await a.instances.get(TENANT, "nobody")

    run(hosts, body)


def test_the_end_of_one_leaves_its_instances_running_and_the_other_touches_none(hosts: list[Settings]) -> None:
    async def body(a: ControlPlane, b: ControlPlane) -> None:
        pids = {}
        for plane, name in ((a, "at-a"), (b, "at-b")):
            pids[name] = (await plane.instances.run(TENANT, sleeper(name), by=OPERATOR)).status.pid
        await b.close()
        await a.instance_controller.resync()
        await a.network_controller.resync()
        assert await states(a) == {"at-a": ("a", "running"), "at-b": ("b", "running")}
        assert all(alive(pid) for pid in pids.values())
        wish = asyncio.ensure_future(a.instances.stop(TENANT, "at-b"))
        await a.instances.stop(TENANT, "at-a")
        assert not alive(pids["at-a"]) and alive(pids["at-b"]) and not wish.done(), "nobody does it"
        async with opened(hosts[1], a) as again:
            assert (await asyncio.wait_for(wish, patiently(30))).status.state == "exited"
            assert not alive(pids["at-b"])
            assert (await again.instances.get(TENANT, "at-b")).status.state == "exited"

    run(hosts, body)


@asynccontextmanager
async def opened(settings: Settings, other: ControlPlane) -> AsyncIterator[ControlPlane]:
    """A control plane of that host on the store of another one."""
    plane = await ControlPlane.open(settings, other.context.store)
    try:
        plane.begin()
        yield plane
    finally:
        await plane.close()
