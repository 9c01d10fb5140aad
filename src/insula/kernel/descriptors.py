"""Descriptors that are kept for long go above the first 1024, and leave those to who can have no others.

open(2) gives the lowest number that is free, and select(2) can wait for numbers below FD_SETSIZE only: glibc aborts a
program that tries more. libnftables waits by select(2) for its netlink socket. So a process that has a few descriptors
for every container moves them out of the way, with fcntl(2), and opens the library's sockets where they work.
"""

from __future__ import annotations

import fcntl
import os

from insula.model.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

FD_SETSIZE: Final = 1024


def high(fd: int) -> int:
    """The same open file under a number that select(2) has no use for; `fd` is closed, or returned if there is none."""
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FD_SETSIZE)
    except OSError:  # RLIMIT_NOFILE allows no such number, or no more
        return fd
    os.close(fd)
    return moved


def check_low(who: str) -> None:
    """Unavailable if the next descriptor would be one that `who`, which uses select(2), can't have."""
    fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    if fd >= FD_SETSIZE - 8:  # others open files meanwhile
        raise Unavailable(f"{who} needs one of the first {FD_SETSIZE} descriptors, and all are in use", "try again")
