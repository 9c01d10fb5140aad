"""Out-of-memory events of instances, also of instances that go on because only a child process was killed.

The kernel signals them on a descriptor for each control group (`insula.kernel.cgroups.events`). The daemon's event loop
watches all of these descriptors, without a thread or task for each. Cgroup version 1 signals before it kills, so the
kernel's counter is read again a moment later. An instance that is out of memory again and again makes one event a
second, with the number of killed processes.
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


class OomWatch:
    """Watches the control group of one running instance."""

    def __init__(self, member: ManagedInstance, driver: Driver, recorder: Recorder, *, adopted: bool) -> None:
        self._member = member
        self._recorder = recorder
        self._events = driver.memory_events(member.instance)
        self._killed = self._events.take() if adopted else 0  # earlier kills were recorded by the previous insulad
        self._look: asyncio.TimerHandle | None = None
        asyncio.get_running_loop().add_reader(self._events.fileno(), self._notified)

    def _notified(self) -> None:
        """Read the counter at each time of `_LOOKS`; further notifications are ignored until then."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._events.fileno())
        self._look = loop.call_later(_LOOKS[0], self._count, 0)

    def _count(self, look: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._tell()
        except OSError as error:  # the group is being removed, or the next read succeeds
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
        """Record kills that were not recorded yet, and stop watching."""
        if self._look:
            self._look.cancel()
        asyncio.get_running_loop().remove_reader(self._events.fileno())
        with contextlib.suppress(OSError):
            self._tell()
        self._events.close()


class OomRecorder:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def begin(self, member: ManagedInstance, driver: Driver, *, adopted: bool) -> None:
        """Begin to record the out-of-memory events of an instance that runs. A failure is only logged."""
        self.end(member)
        if "memory-events" not in driver.features:
            return
        try:
            member.memory = OomWatch(member, driver, self._recorder, adopted=adopted)
        except (OSError, InsulaError) as error:
            log.warning("instance %s/%s: no events of memory: %s", *member.key, error)

    def end(self, member: ManagedInstance) -> None:
        """Stop recording; called before the instance's control group is removed."""
        if member.memory:
            member.memory.close()
            member.memory = None
