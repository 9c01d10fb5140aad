"""Who ran out of memory, as it happens: also if only a child was killed, and the instance goes on.

The kernel tells on a descriptor for each control group (`insula.kernel.cgroups.events`), and the daemon's one event
loop watches them all: no thread, no task, nothing to do until it happens. On version 1 the kernel tells before it
kills; so what was counted is looked at again a moment later. An instance that is killed for memory again and again
makes an event a second, with the number of processes, not one for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from insula.control.instances.drivers.base import Driver
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.recorder import Recorder
from insula.model.errors import InsulaError

log = logging.getLogger("insula.control")
_LOOKS: Final = (0.05, 0.2, 1.0)
"""Seconds after a notification at which the kernel's count is read; the last also bounds the rate of events."""


class Watch:
    """The control group of one running instance."""

    def __init__(self, member: ManagedInstance, driver: Driver, recorder: Recorder, *, adopted: bool) -> None:
        self._member = member
        self._recorder = recorder
        self._events = driver.memory_events(member.instance)
        self._killed = self._events.take() if adopted else 0  # before this insulad came: told by the one before
        self._look: asyncio.TimerHandle | None = None
        asyncio.get_running_loop().add_reader(self._events.fileno(), self._notified)

    def _notified(self) -> None:
        """Hears nothing more until it has looked for the last time."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._events.fileno())
        self._look = loop.call_later(_LOOKS[0], self._count, 0)

    def _count(self, look: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._tell()
        except OSError as error:  # it is ending, or this is told the next time
            log.warning("instance %s/%s: no count of memory: %s", *self._member.key, error)
        if look + 1 < len(_LOOKS):
            self._look = loop.call_later(_LOOKS[look + 1], self._count, look + 1)
        else:
            self._look = None
            loop.add_reader(self._events.fileno(), self._notified)

    def _tell(self) -> None:
        killed = self._events.take()
        if killed > self._killed:
            self._recorder.record(self._member, "oom", killed=killed - self._killed)
            self._killed = killed

    def close(self) -> None:
        """Tells what was not yet told."""
        if self._look:
            self._look.cancel()
        asyncio.get_running_loop().remove_reader(self._events.fileno())
        with contextlib.suppress(OSError):
            self._tell()
        self._events.close()


class MemoryEvents:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def begin(self, member: ManagedInstance, driver: Driver, *, adopted: bool) -> None:
        """It runs: have its events recorded from now on. Without them it runs as well."""
        self.end(member)
        if "memory-events" not in driver.features:
            return
        try:
            member.memory = Watch(member, driver, self._recorder, adopted=adopted)
        except (OSError, InsulaError) as error:
            log.warning("instance %s/%s: no events of memory: %s", *member.key, error)

    def end(self, member: ManagedInstance) -> None:
        """It ended; before its control group is removed."""
        if member.memory:
            member.memory.close()
            member.memory = None
