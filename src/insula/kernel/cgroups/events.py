"""Notifications that memory ran out in a group, for poll, epoll and asyncio.

Version 1: an eventfd(2) is registered for memory.oom_control by writing to cgroup.event_control. The kernel increments
it when the group is at its limit and nothing can be reclaimed, just before the OOM killer runs (the kernel's
admin-guide/cgroup-v1/memory.rst).

Version 2: memory.events has counters, and poll(2) reports POLLPRI after a change until the file is read again. An
epoll(7) instance turns that into a readable descriptor; inotify(7) is not used because a user has only 128 instances.

The descriptor also becomes readable when no further event can occur: in version 1 when the group is removed, in version
2 when its last process has ended (cgroup.events).
"""

from __future__ import annotations

import os
import select

from insula.kernel import descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_FILES = ("memory.events", "cgroup.events")


class OutOfMemory:
    """A descriptor (`fileno`) that is readable when memory ran out or the group has ended. A context manager."""

    def __init__(self, oom_kills: Callable[[], int]) -> None:
        self._oom_kills = oom_kills

    def fileno(self) -> int:
        raise NotImplementedError

    def take(self) -> int:
        """Consume the notification, and return the number of processes that the OOM killer has killed so far.

        The event precedes the kill, so the number may rise a moment later; version 2 has another event then.
        """
        self._clear()
        return self._oom_kills()

    def _clear(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> OutOfMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OutOfMemoryV1(OutOfMemory):
    """Notifications of version 1, for the group's `directory` of the memory controller. OSError."""

    def __init__(self, directory: str, oom_kills: Callable[[], int]) -> None:
        super().__init__(oom_kills)
        self._fd = _eventfd(directory)

    def fileno(self) -> int:
        return self._fd

    def _clear(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return

    def close(self) -> None:
        os.close(self._fd)


class OutOfMemoryV2(OutOfMemory):
    """Notifications of version 2, for the group's `directory`. OSError."""

    def __init__(self, directory: str, oom_kills: Callable[[], int]) -> None:
        super().__init__(oom_kills)
        self._poll = select.epoll()
        self._watched: list[int] = []
        try:
            for name in _FILES:
                fd = descriptors.move_above_select_limit(os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC))
                self._watched.append(fd)
                os.read(fd, 4096)  # without this, poll reports changes from before
                self._poll.register(fd, select.EPOLLPRI)
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        return self._poll.fileno()

    def _clear(self) -> None:
        for fd in self._watched:
            try:
                os.pread(fd, 4096, 0)
            except OSError:  # ENODEV: the group was removed
                continue

    def close(self) -> None:
        for fd in self._watched:
            os.close(fd)
        self._poll.close()


def _eventfd(directory: str) -> int:
    """Make an eventfd(2) and register it for memory.oom_control."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        watched = os.open(f"{directory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        try:
            control = os.open(f"{directory}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(control, f"{fd} {watched}".encode())
            finally:
                os.close(control)
        finally:
            os.close(watched)
    except OSError:
        os.close(fd)
        raise
    return descriptors.move_above_select_limit(fd)
