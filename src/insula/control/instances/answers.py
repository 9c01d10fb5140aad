"""Whether instances that run answer Insula: a virtual machine whose emulator or whose guest hangs does not.

It is shown, and events tell when it began and ended. Nothing else is done about it: a slow machine is no dead one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from insula.control.instances.drivers.base import Driver
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.recorder import Recorder
from insula.model.errors import InsulaError


class AnswersRecorder:
    """Follows which instances answer. `spawn` starts a task that ends with the daemon."""

    def __init__(self, recorder: Recorder, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        self._recorder = recorder
        self._spawn = spawn

    def begin(self, member: ManagedInstance, driver: Driver) -> None:
        """Begin to follow an instance that runs, or starts."""
        self.end(member)
        if "answers" in driver.features:
            member.following = self._spawn(self._follow(member, driver))

    async def _follow(self, member: ManagedInstance, driver: Driver) -> None:
        with contextlib.suppress(InsulaError):  # it has ended
            async for answers in driver.answers(member.instance.id):
                if answers != member.answers:
                    member.answers = answers
                    self._recorder.record(member, "responsive" if answers else "unresponsive")

    def end(self, member: ManagedInstance) -> None:
        """Stop following it."""
        if member.following:
            member.following.cancel()
            member.following = None
        member.answers = True
