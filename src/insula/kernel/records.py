"""Read small files that only we write, and that may be anything by the time they are read again.

After a crash of the host, a full disk or somebody's repair, there may be garbage, a directory, a link, or a FIFO whose
opening waits for ever. All of that is an OSError here.
"""

from __future__ import annotations

import errno
import os
import stat

LIMIT = 16 << 20


def read(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file of at most 16 MiB. OSError for anything else; it never waits."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        if found.st_size > LIMIT:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), os.fspath(path))
        data = b""
        while piece := os.read(fd, found.st_size + 1 - len(data)):
            data += piece
            if len(data) > found.st_size:
                break
        return data
    finally:
        os.close(fd)
