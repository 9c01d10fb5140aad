"""Notifications that memory ran out in a group, for poll, epoll and asyncio.

Version 1: the writer of cgroup.event_control registers an eventfd(2) for memory.oom_control. The kernel counts it up
when the group hits its limit and nothing could be reclaimed, just before it kills (the kernel's memcg documentation).

Version 2: memory.events has counters, and poll(2) reports POLLPRI after a change until the file is read again. An
epoll(7) instance makes one readable descriptor of that; inotify(7) would do as well, but a user has only 128 instances.

The descriptor also becomes readable when no event can follow: in version 1 when the group is removed, in version 2 when
its last process has ended (cgroup.events).
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
    """Readable (`fileno`) when memory ran out, or the group is at its end. `close` it, or use it with `with`."""

    def __init__(self, oom_kills: Callable[[], int]) -> None:
        self._oom_kills = oom_kills

    def fileno(self) -> int:
        raise NotImplementedError

    def take(self) -> int:
        """Make it unreadable again; return how many processes of the group were killed for want of memory so far.

        The event comes before the kill: the number may rise a moment later, and in version 2 there is an event then.
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
    """For the group's `directory` of the memory controller. OSError."""

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
    """For the group's `directory`. OSError."""

    def __init__(self, directory: str, oom_kills: Callable[[], int]) -> None:
        super().__init__(oom_kills)
        self._poll = select.epoll()
        self._watched: list[int] = []
        try:
            for name in _FILES:
                fd = descriptors.high(os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC))
                self._watched.append(fd)
                os.read(fd, 4096)  # changes before this are no news
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
    """An eventfd(2) that is registered for memory.oom_control."""
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
    return descriptors.high(fd)
