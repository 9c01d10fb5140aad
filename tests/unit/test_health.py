"""Health checks: schedule, results, and their evaluation."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.instances.health import AT_ONCE, HealthChecks, HealthMonitor
from insula.model.errors import Invalid
from insula.model.health import HealthPlan, plan
from insula.model.objects import Healthcheck
from insula.model.views import HealthCheckResult

PLAN = HealthPlan(["true"], interval=30, timeout=30, retries=3, start_period=60, start_interval=5)


def test_without_a_health_check() -> None:
    assert plan(None, None) is None
    assert plan(Healthcheck(interval=5), None) is None
    assert plan(Healthcheck(test=["NONE"]), Healthcheck(test=["CMD", "x"])) is None


def test_the_users_options_replace_only_their_fields() -> None:
    image = Healthcheck(test=["CMD-SHELL", "wget localhost"], interval=10, retries=5)
    assert plan(None, image) == HealthPlan(["/bin/sh", "-c", "wget localhost"], 10, 30, 5, 0, 5)
    assert plan(Healthcheck(interval=20), image) == HealthPlan(["/bin/sh", "-c", "wget localhost"], 20, 30, 5, 0, 5)
    assert plan(Healthcheck(test=["CMD", "a", "b"]), image) == HealthPlan(["a", "b"], 10, 30, 5, 0, 5)


@pytest.mark.parametrize(
    "bad",
    [
        {"test": ["CMD"]},
        {"test": ["CMD", ""]},
        {"test": ["CMD-SHELL"]},
        {"test": ["CMD-SHELL", "a", "b"]},
        {"test": ["true"]},
        {"interval": 0.5},
        {"timeout": 1e9},
        {"timeout": float("nan")},
        {"start_period": -1},
        {"start_interval": 0},
        {"retries": 0},
        {"retries": 1 << 40},
    ],
    ids=str,
)
def test_nonsense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as raised:
        plan(Healthcheck(**bad), None)
    assert "\n" not in str(raised.value) and raised.value.hint


def test_checks_come_more_often_in_the_start_period() -> None:
    assert PLAN.pause("starting", 10) == 5
    assert PLAN.pause("starting", 60) == PLAN.pause("healthy", 10) == 30
    assert PLAN._replace(interval=2).pause("starting", 10) == 2, "never less often than else"


class Stub:
    """A member, as far as a monitor looks at it."""

    class status:
        started = 1000.0
        state = "running"

    class instance:
        tenant = "acme"

    def __init__(self) -> None:
        self.monitor: HealthMonitor | None = None


def monitor() -> HealthMonitor:
    return HealthMonitor(cast("Any", Stub()), PLAN)


@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=40))
def test_judgement(answers: list[tuple[int, bool]]) -> None:
    """Docker's rules, said once more: a success is health at once; `retries` counted failures in a row are none."""
    checked, status, failures, clock = monitor(), "starting", 0, 1000.0
    for seconds, success in answers:
        clock += seconds
        probe = HealthCheckResult(started=clock, finished=clock, exit_status=0 if success else 1, output="")
        checked.health = checked.judge(probe)
        if success:
            status, failures = "healthy", 0
        elif status != "starting" or clock - 1000 >= PLAN.start_period:
            failures += 1
            status = "unhealthy" if failures >= PLAN.retries else status
        assert (checked.health.status, checked.health.failures) == (status, failures)
        assert checked.health.log[-1] == probe and len(checked.health.log) <= 5


def test_a_killed_check_is_a_failure() -> None:
    checked = monitor()
    probe = HealthCheckResult(started=2000.0, finished=2030.0, exit_status=None, output="")
    assert checked.judge(probe).failures == 1


def test_one_tenants_checks_wait_for_each_other_and_nobody_elses() -> None:
    """A hundred are due at once: only so many run, all get their turn, and another tenant doesn't wait."""

    async def run() -> None:
        tasks: set[asyncio.Task[Any]] = set()
        running, most, done, gate = 0, 0, [], asyncio.Event()

        def spawn(work: Any) -> asyncio.Task[Any]:
            tasks.add(task := asyncio.get_running_loop().create_task(work))
            return task

        class Checks(HealthChecks):
            async def _check(self, monitor: HealthMonitor) -> None:
                nonlocal running, most
                running, most = running + 1, max(most, running + 1)
                if monitor.member.instance.tenant == "acme":
                    await gate.wait()
                running -= 1
                done.append(monitor.member.instance.tenant)

        checks = Checks(cast("Any", None), cast("Any", None), spawn)
        for _ in range(100):
            checks._schedule(monitor(), 0.0)
        other = monitor()
        other.member.instance = cast("Any", type("instance", (), {"tenant": "other"}))
        checks._schedule(other, 0.01)
        while not done:
            await asyncio.sleep(0.01)
        assert done == ["other"] and running == AT_ONCE
        gate.set()
        while len(done) < 101:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert most == AT_ONCE + 1
        assert not checks._running and not checks._waiting and not checks._due

    asyncio.run(run())
