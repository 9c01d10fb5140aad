"""A driver outside of the tree runs instances by the same verbs: the control plane knows only `Driver`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from insula.control.identities.authority import OPERATOR
from insula.control.instances.drivers import registry
from insula.control.plane import ControlPlane
from insula.model.errors import Conflict, Failed, Invalid
from insula.model.objects import InstanceSpec, RestartPolicy
from insula.model.views import ExecSpec
from insula.settings import Settings
from tests.support.machine import Run
from tests.support.planes import NO_TEMPLATE
from tests.support.process_driver import ProcessDriver
from tests.support.wait import eventually

TENANT = "default"


@pytest.fixture
def settings(run_: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setattr(registry, "DRIVERS", {ProcessDriver.kind: ProcessDriver})
    prefix = run_.next_prefix()
    path = run_.path / prefix
    made = Settings(path / "root", path / "run", prefix, path / "run" / "insulad.sock", machines=NO_TEMPLATE)
    yield made

    async def end() -> None:
        async with opened(made) as plane:
            await plane.host.down()

    asyncio.run(end())


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[ControlPlane]:
    plane = await ControlPlane.open(settings)
    try:
        plane.begin()
        yield plane
    finally:
        await plane.close()


def run(settings: Settings, body: Callable[[ControlPlane], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with opened(settings) as plane:
            await body(plane)

    asyncio.run(whole())


def process_of(name: str, *command: str, **more: object) -> InstanceSpec:
    return InstanceSpec(image="busybox", name=name, networks=[], command=list(command), stop_timeout=5, **more)  # type: ignore[arg-type]


def alive(pid: int | None) -> bool:
    return pid is not None and os.path.exists(f"/proc/{pid}")


def test_an_instance_is_run_stopped_started_and_removed(settings: Settings) -> None:
    async def body(plane: ControlPlane) -> None:
        verbs = plane.instances
        started = (await verbs.run(TENANT, process_of("web", "sleep", "600"), by=OPERATOR)).status
        assert started.state == "running" and alive(started.pid)
        ours = [os.readlink(f"/proc/{pid}/ns/pid") for pid in ("self", started.pid)]
        assert ours[0] == ours[1], "it is this driver's: a container has a namespace of its own"
        stopped = (await verbs.stop(TENANT, "web")).status
        assert (stopped.state, stopped.exit and stopped.exit.exit_status, alive(started.pid)) == ("exited", 143, False)
        again = (await verbs.restart(TENANT, "web", by=OPERATOR)).status
        assert again.pid != started.pid and alive(again.pid)
        await verbs.remove(TENANT, "web", force=True)
        assert not alive(again.pid) and await verbs.list(TENANT) == []
        await eventually(lambda: os.listdir(settings.instances) == [], "its files go, too")

    run(settings, body)


def test_an_exit_and_the_restart_policy(settings: Settings) -> None:
    async def body(plane: ControlPlane) -> None:
        verbs = plane.instances
        await verbs.run(TENANT, process_of("three", "sh", "-c", "exit 3"), by=OPERATOR)
        assert (await verbs.wait(TENANT, "three")).exit_status == 3
        policy = RestartPolicy(name="on-failure", max_retries=1)
        await verbs.run(TENANT, process_of("twice", "sh", "-c", "exit 4", restart=policy), by=OPERATOR)

        managed = next(m for m in plane.managed.all() if m.instance.name == "twice")

        def over() -> bool:
            return (managed.status.state, managed.status.restarts, managed.busy) == ("exited", 1, False)

        await eventually(over, "it is started once more, and no more")

    run(settings, body)


def test_another_control_plane_takes_over(settings: Settings) -> None:
    pids: list[int | None] = []

    async def first(plane: ControlPlane) -> None:
        pids.append((await plane.instances.run(TENANT, process_of("web", "sleep", "600"), by=OPERATOR)).status.pid)

    async def second(plane: ControlPlane) -> None:
        await eventually(lambda: all(m.reconciled.is_set() for m in plane.managed.all()), "it was looked at")
        status = (await plane.instances.get(TENANT, "web")).status
        assert (status.state, status.pid) == ("running", pids[0]) and alive(pids[0])
        await plane.instances.remove(TENANT, "web", force=True)
        assert not alive(pids[0])

    run(settings, first)
    run(settings, second)


class Unpausable(ProcessDriver):
    """It says that it can pause, and fails at once: sooner than the verb waits for the controller."""

    features = frozenset({"pause"})

    async def pause(self, instance_id: str) -> None:
        raise Failed("no brakes", "repair them")


def test_an_immediate_failure_has_its_reason(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DRIVERS", {Unpausable.kind: Unpausable})

    async def body(plane: ControlPlane) -> None:
        await plane.instances.run(TENANT, process_of("web", "sleep", "600"), by=OPERATOR)
        wait_for = plane.instances.converged

        async def late(found: Any) -> Any:
            await asyncio.sleep(0.1)  # the controller hears of the commit from the store, and is faster
            return await wait_for(found)

        monkeypatch.setattr(plane.instances, "converged", late)
        for _ in range(3):
            with pytest.raises(Failed, match="no brakes"):
                await plane.instances.pause(TENANT, "web")
            status = (await plane.instances.get(TENANT, "web")).status
            assert (status.state, status.error) == ("running", "no brakes")

    run(settings, body)


def test_missing_features_are_refused_in_one_line(settings: Settings) -> None:
    async def body(plane: ControlPlane) -> None:
        with pytest.raises(Invalid, match="no network"):
            await plane.instances.run(TENANT, InstanceSpec(image="busybox", name="net", command=["true"]), by=OPERATOR)
        assert await plane.instances.list(TENANT) == []
        await plane.instances.run(TENANT, process_of("web", "sleep", "600"), by=OPERATOR)
        with pytest.raises(Conflict):
            await plane.instances.exec_create(TENANT, "web", ExecSpec(command=["true"]))
        with pytest.raises(Conflict):
            await plane.instances.pause(TENANT, "web")
        assert (await plane.instances.get(TENANT, "web")).status.state == "running"

    run(settings, body)
