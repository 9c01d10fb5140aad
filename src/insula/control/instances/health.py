"""Health checks of instances (Docker's HEALTHCHECK).

`HealthChecks` keeps the next checks of all instances in one heap, by the time they are due, and one timer for the first
of them. So a thousand instances don't need a thousand tasks. A check is a process that joins the instance, as by
`insula exec`: within its limits, as its user, with its rights. At most `AT_ONCE` checks of one tenant run at a time, so
a tenant whose checks hang delays only its own. The first `OUTPUT` bytes of a check's output are kept. A check that
takes longer than its timeout is killed.

Results are kept in memory. When `insulad` starts again, the health of each instance is `starting`, and checks go on.
A check that the previous insulad had begun is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import os
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Sequence
from signal import SIGKILL
from typing import Any, Final

from insula.control.instances.drivers.base import Driver, Streams
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.recorder import Recorder
from insula.model.errors import InsulaError, NotFound
from insula.model.health import HealthPlan, plan
from insula.model.objects import Instance
from insula.model.views import ExecSpec, Health, HealthCheckResult

log = logging.getLogger("insula.health")
AT_ONCE: Final = 8  # checks of one tenant
OUTPUT: Final = 4096  # bytes of a check's output that are kept
LOG: Final = 5  # results that are kept
PREFIX: Final = "health"
"""The prefix of checks' exec IDs, by which the next insulad recognizes them."""
_RETRY = 1.0
_TRIES = 30


class HealthMonitor:
    """The health checks of one start of an instance, and their results; `over` once that start has ended."""

    def __init__(self, member: ManagedInstance, plan: HealthPlan) -> None:
        self.member = member
        self.plan = plan
        self.started = member.status.started or time.time()
        self.health = Health(status="starting")
        self.process: object | None = None  # from `Driver.prepare_exec`; reused for each check
        self.over = False

    def judge(self, probe: HealthCheckResult) -> Health:
        """The health after one more result."""
        before, status, failures = self.health, self.health.status, 0
        if probe.exit_status == 0:
            status = "healthy"
        elif before.status != "starting" or probe.started - self.started >= self.plan.start_period:
            failures = before.failures + 1
            if failures >= self.plan.retries:
                status = "unhealthy"
        return Health(status=status, failures=failures, log=[*before.log, probe][-LOG:])


class HealthChecks:
    """The health checks of all instances. `driver` returns the driver of an instance. `spawn` starts a task that ends
    with the daemon."""

    def __init__(
        self,
        driver: Callable[[Instance], Driver],
        recorder: Recorder,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ) -> None:
        self._driver = driver
        self._recorder = recorder
        self._spawn = spawn
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, HealthMonitor]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._running: Counter[str] = Counter()  # by tenant
        self._waiting: defaultdict[str, deque[HealthMonitor]] = defaultdict(deque)

    def begin(self, member: ManagedInstance, *, adopted: bool = False) -> None:
        """Begin the checks of an instance that runs, if it has any. The first checks of adopted instances are spread
        over their interval, since all would be due at once."""
        self.end(member)
        driver = self._driver(member.instance)
        if "exec" not in driver.features:
            return
        execs = driver.execs(member.instance.id) if adopted else []
        if left := [each for each in execs if each.startswith(PREFIX)]:
            self._spawn(self._sweep(member.instance, left))
        try:
            wanted = plan(member.instance.spec.healthcheck, member.instance.config.healthcheck)
        except InsulaError as error:
            log.warning("instance %s/%s has no health checks: %s", *member.key, error)
            return
        if wanted:
            member.monitor = monitor = HealthMonitor(member, wanted)
            pause = wanted.pause("starting", time.time() - monitor.started)
            self._schedule(monitor, pause * random.random() if adopted else pause)

    def end(self, member: ManagedInstance) -> None:
        """End the checks of an instance that has ended; its processes have ended with it."""
        if member.monitor:
            member.monitor.over = True
            member.monitor = None

    # -- schedule --------------------------------------------------------------------------------------------------

    def _schedule(self, monitor: HealthMonitor, pause: float) -> None:
        loop = asyncio.get_running_loop()
        heapq.heappush(self._due, (loop.time() + pause, next(self._numbers), monitor))
        if self._timer is None or self._due[0][0] < self._timer.when():
            self._set_timer(loop)

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = loop.call_at(self._due[0][0], self._ring) if self._due else None

    def _ring(self) -> None:
        loop = asyncio.get_running_loop()
        while self._due and self._due[0][0] <= loop.time():
            self._begin_check(heapq.heappop(self._due)[2])
        self._set_timer(loop)

    def _begin_check(self, monitor: HealthMonitor) -> None:
        tenant, state = monitor.member.instance.tenant, monitor.member.status.state
        if monitor.over:
            return
        if state != "running":  # a paused instance can't answer
            self._schedule(monitor, monitor.plan.interval)
        elif self._running[tenant] < AT_ONCE:
            self._running[tenant] += 1
            self._spawn(self._check(monitor)).add_done_callback(lambda _: self._check_ended(tenant))
        else:
            self._waiting[tenant].append(monitor)

    def _check_ended(self, tenant: str) -> None:
        self._running[tenant] -= 1
        waiting = self._waiting[tenant]
        while waiting and self._running[tenant] < AT_ONCE:
            self._begin_check(waiting.popleft())
        if not self._running[tenant]:
            del self._running[tenant], self._waiting[tenant]

    # -- one check -------------------------------------------------------------------------------------------------

    async def _check(self, monitor: HealthMonitor) -> None:
        try:
            probe = await self._probe(monitor)
        except Exception:  # a fault of insulad and no result; checks go on
            log.exception("instance %s/%s: a health check failed", *monitor.member.key)
            self._schedule(monitor, monitor.plan.interval)
            return
        if monitor.over:
            return
        before, monitor.health = monitor.health, monitor.judge(probe)
        now = monitor.health
        if now.status != before.status:
            details = {} if now.status == "healthy" else {"failures": now.failures, "exit_status": probe.exit_status}
            self._recorder.record(monitor.member, now.status, **details)
        self._schedule(monitor, monitor.plan.pause(now.status, time.time() - monitor.started))

    async def _probe(self, monitor: HealthMonitor) -> HealthCheckResult:
        instance, exec_id = monitor.member.instance, PREFIX + os.urandom(6).hex()
        driver = self._driver(instance)
        started, status, output = time.time(), None, bytearray()
        try:
            async with asyncio.timeout(monitor.plan.timeout):
                await driver.exec(instance.id, await self._process(monitor), exec_id)
                status = await self._result(driver, instance.id, exec_id, output)
        except TimeoutError:
            output += f"\nkilled after {monitor.plan.timeout:g} s".encode()
            await self._kill(monitor, exec_id)
        except InsulaError as error:
            status, output[:] = error.exit_status, str(error).encode()
        driver.forget_exec(instance.id, exec_id)
        text = output.decode(errors="replace").strip()
        return HealthCheckResult(started=started, finished=time.time(), exit_status=status, output=text)

    async def _process(self, monitor: HealthMonitor) -> object:
        if monitor.process is None:
            member, spec = monitor.member, ExecSpec(command=monitor.plan.command)
            driver = self._driver(member.instance)
            monitor.process = await driver.prepare_exec(member.tenant, member.instance, spec)
        return monitor.process

    async def _result(self, driver: Driver, instance_id: str, exec_id: str, output: bytearray) -> int | None:
        """Wait for the end of a check and return its exit status. Its output is added to `output`."""
        try:
            stream = await driver.attach(instance_id, exec_id)
        except NotFound:  # it ended at once, or the monitor did; the exit status is still recorded
            return (await driver.wait(instance_id, exec_id)).exit_status
        reading = asyncio.ensure_future(_read(stream, output))
        try:
            record = await driver.wait(instance_id, exec_id)
            if not reading.done():
                await stream.finish()
                await asyncio.wait([reading], timeout=_RETRY)
        finally:
            reading.cancel()
            stream.close()
        return record.exit_status

    async def _kill(self, monitor: HealthMonitor, exec_id: str) -> None:
        """Kill a check, and wait for its end. While its instance is frozen a check may not have begun yet, and does not
        die."""
        instance, tries = monitor.member.instance, 0
        driver = self._driver(instance)
        while not monitor.over and tries < _TRIES:
            tries += monitor.member.status.state == "running"
            with contextlib.suppress(NotFound):
                driver.signal(instance.id, SIGKILL, exec_id, group=True)
            with contextlib.suppress(NotFound, TimeoutError):
                async with asyncio.timeout(_RETRY):
                    await driver.wait(instance.id, exec_id)
                    return
            await asyncio.sleep(_RETRY / 10)

    async def _sweep(self, instance: Instance, execs: Sequence[str]) -> None:
        """Kill checks that a previous insulad has begun."""
        driver = self._driver(instance)
        for exec_id in execs:
            with contextlib.suppress(NotFound):
                driver.signal(instance.id, SIGKILL, exec_id, group=True)
            with contextlib.suppress(NotFound):
                await driver.wait(instance.id, exec_id)
            driver.forget_exec(instance.id, exec_id)


async def _read(stream: Streams, output: bytearray) -> None:
    """Read at most `OUTPUT` bytes, then close the stream; the monitor drops further output."""
    async for _, data in stream:
        output += data[: OUTPUT - len(output)]
        if len(output) >= OUTPUT:
            stream.close()
            return
