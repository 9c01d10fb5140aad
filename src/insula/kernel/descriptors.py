"""Keep descriptor numbers below FD_SETSIZE (1024) free for libraries that use select(2).

open(2) returns the lowest free number. select(2) supports only numbers below FD_SETSIZE; glibc aborts a program that
uses a higher one. libnftables waits for its netlink socket with select(2). A process with several descriptors for each
container moves those above the limit (F_DUPFD_CLOEXEC of fcntl(2)), so that the library gets a low number.
"""

from __future__ import annotations

import fcntl
import os

from insula.model.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

FD_SETSIZE: Final = 1024


def move_above_select_limit(fd: int) -> int:
    """Move `fd` to a number of FD_SETSIZE or more and return that; `fd` itself if no such number is free."""
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FD_SETSIZE)
    except OSError:  # RLIMIT_NOFILE is too low, or reached
        return fd
    os.close(fd)
    return moved


def require_selectable(library: str) -> int:
    """Return the next descriptor, which is low enough for `library`: it uses select(2). Unavailable if it isn't. It is
    free, and another thread may take it first."""
    fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    if fd >= FD_SETSIZE - 8:  # other threads open files meanwhile
        raise Unavailable(f"{library} needs one of the first {FD_SETSIZE} descriptors, and all are in use", "try again")
    return fd
