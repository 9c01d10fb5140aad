"""What is watched of instances while they run: their health, their memory, and whether they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from insula.control.instances.answers import AnswersRecorder
from insula.control.instances.drivers.base import Driver
from insula.control.instances.health import HealthChecks
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.memory import OomRecorder
from insula.control.instances.recorder import Recorder
from insula.model.objects import Instance


class Watches:
    """The watches of all instances. `driver` returns the driver of an instance. `spawn` starts a task that ends with
    the daemon."""

    def __init__(
        self,
        driver: Callable[[Instance], Driver],
        recorder: Recorder,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ) -> None:
        self._driver = driver
        self._health = HealthChecks(driver, recorder, spawn)
        self._memory = OomRecorder(recorder)
        self._answers = AnswersRecorder(recorder, spawn)

    def begin(self, member: ManagedInstance, *, adopted: bool = False) -> None:
        """Begin to watch an instance whose first process runs."""
        self._health.begin(member, adopted=adopted)
        self._memory.begin(member, self._driver(member.instance), adopted=adopted)
        if member.status.state != "starting":
            self.ready(member)

    def ready(self, member: ManagedInstance) -> None:
        """Begin to watch what can be watched only of one that is ready."""
        self._answers.begin(member, self._driver(member.instance))

    def end(self, member: ManagedInstance) -> None:
        """Stop watching one that has ended; called before its control group is removed."""
        self._health.end(member)
        self._memory.end(member)
        self._answers.end(member)
