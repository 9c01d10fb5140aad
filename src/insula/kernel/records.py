"""Read and write small files that only we write, and that may be anything by the time they are needed again.

After a crash of the host, a full disk or somebody's repair, there may be garbage, a directory, a link, or a FIFO whose
opening waits for ever. Reading any of that is an OSError here, and writing puts a file in its place.
"""

from __future__ import annotations

import errno
import os
import stat

LIMIT = 16 << 20
_WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC


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


def replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file of mode 0600 as a whole: a reader finds the old one or the new one, whatever crashes."""
    draft = f"{os.fspath(path)}.new"
    _clear(draft)
    fd = os.open(draft, _WRITE | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _write_all(fd, data)
    finally:
        os.close(fd)
    try:
        os.rename(draft, path)
    except IsADirectoryError:
        _clear(path)
        os.rename(draft, path)


def overwrite(path: str | os.PathLike[str], data: bytes, mode: int, owner: int) -> None:
    """Write a file in place, since it may be mounted elsewhere; `owner` is its user and group."""
    try:
        fd = os.open(path, _WRITE | os.O_NONBLOCK | os.O_TRUNC)
    except OSError:
        fd = -1
    if fd >= 0 and not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        fd = -1
    if fd < 0:
        _clear(path)
        fd = os.open(path, _WRITE | os.O_CREAT | os.O_EXCL, mode)
    try:
        _write_all(fd, data)
        os.fchmod(fd, mode)
        os.fchown(fd, owner, owner)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _clear(path: str | os.PathLike[str]) -> None:
    """Remove whatever is at `path`."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        from insula.kernel import trees

        trees.remove(path)
