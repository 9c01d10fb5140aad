"""To be told that memory ran out in a group, instead of looking again and again.

Version 1: the writer of cgroup.event_control registers an eventfd(2) for memory.oom_control; the kernel counts it up
when the group hits its limit and nothing could be reclaimed, just before it kills (the kernel's memcg documentation).
Version 2: memory.events counts, and a change of it is seen by inotify(7). Both are descriptors for poll(2), epoll(7)
and asyncio. Both also wake who waits when nothing more is to come: version 1 when the group is removed, version 2 when
its last process has ended (cgroup.events).
"""

from __future__ import annotations

import os
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.kernel.cgroups.group import Cgroup

_IN_MODIFY = 0x2
_IN_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC


class OutOfMemory:
    """Readable (`fileno`) when memory ran out, or the group is at its end. `close` it, or use it with `with`."""

    def __init__(self, group: Cgroup) -> None:
        self._group = group
        self._fd = _inotify(group.directory("") or "") if group.tree.unified else _eventfd(group)

    def fileno(self) -> int:
        return self._fd

    def take(self) -> int:
        """Makes it unreadable again, and tells how many processes of the group were killed for want of memory so far.

        The event comes before the kill: the number may rise a moment later, and with version 2 there is an event then.
        """
        with suppress(BlockingIOError):
            os.read(self._fd, 4096 if self._group.tree.unified else 8)
        return self._group.oom_kills()

    def close(self) -> None:
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
    return fd


def _inotify(directory: str) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.inotify_init1(_IN_NONBLOCK_CLOEXEC)
    watched = [f"{directory}/{file}" for file in ("memory.events", "cgroup.events")]
    if fd >= 0 and all(libc.inotify_add_watch(fd, os.fsencode(path), _IN_MODIFY) >= 0 for path in watched):
        return fd
    error = ctypes.get_errno()
    if fd >= 0:
        os.close(fd)
    raise OSError(error, f"inotify: {os.strerror(error)}", directory)
