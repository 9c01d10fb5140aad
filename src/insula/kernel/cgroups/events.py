"""To be told that memory ran out in a group, instead of looking again and again.

Version 1: the writer of cgroup.event_control registers an eventfd(2) for memory.oom_control; the kernel counts it up
when the group hits its limit and nothing could be reclaimed, just before it kills (the kernel's memcg documentation).
Version 2: memory.events counts, and tells poll(2) of a change by POLLPRI until it is read again. An epoll(7) instance
makes one descriptor of it that is simply readable; inotify(7) would do as well, but a user has 128 instances in all.
Both are for poll, epoll and asyncio, and both also wake who waits when nothing more is to come: version 1 when the
group is removed, version 2 when its last process has ended (cgroup.events).
"""

from __future__ import annotations

import os
import select
from contextlib import suppress

from insula.kernel import descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.kernel.cgroups.group import Cgroup

_FILES = ("memory.events", "cgroup.events")


class OutOfMemory:
    """Readable (`fileno`) when memory ran out, or the group is at its end. `close` it, or use it with `with`."""

    def __init__(self, group: Cgroup) -> None:
        self._group = group
        self._poll: select.epoll | None = None
        self._watched: list[int] = []
        if group.tree.unified:
            self._poll = select.epoll()
            self._watch(group.directory("") or "", self._poll)
        else:
            self._fd = _eventfd(group)

    def _watch(self, directory: str, poll: select.epoll) -> None:
        try:
            for name in _FILES:
                fd = descriptors.high(os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC))
                self._watched.append(fd)
                os.read(fd, 4096)  # what is before is no news
                poll.register(fd, select.EPOLLPRI)
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        return self._poll.fileno() if self._poll else self._fd

    def take(self) -> int:
        """Makes it unreadable again, and tells how many processes of the group were killed for want of memory so far.

        The event comes before the kill: the number may rise a moment later, and with version 2 there is an event then.
        """
        for fd in self._watched:
            with suppress(OSError):  # ENODEV: the group was removed
                os.pread(fd, 4096, 0)
        if not self._poll:
            with suppress(BlockingIOError):
                os.read(self._fd, 8)
        return self._group.oom_kills()

    def close(self) -> None:
        for fd in self._watched:
            os.close(fd)
        if self._poll:
            self._poll.close()
        else:
            os.close(self._fd)

    def __enter__(self) -> OutOfMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _eventfd(group: Cgroup) -> int:
    directory = group.directory("memory")
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
