"""Read and write small state files, robustly against anything else found at their paths.

After a crash of the host, a full disk or a manual repair there may be garbage, a directory, a link, or a FIFO whose
open(2) blocks. Reading such a file raises OSError, and writing replaces it with a regular file.
"""

from __future__ import annotations

import errno
import os
import stat

LIMIT = 16 << 20
_WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC


def read(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file of at most 16 MiB. OSError for anything else. Never blocks on a FIFO or device."""
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
    """Write a file of mode 0600 atomically: a reader finds the old or the new content, also after a crash."""
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


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file of mode 0600 in a directory of our own; one that is there is overwritten."""
    fd = os.open(path, _WRITE | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        _write_all(fd, data)
    finally:
        os.close(fd)


def overwrite(path: str | os.PathLike[str], data: bytes, mode: int, owner: int) -> None:
    """Write a file in place, for a file that is bind-mounted elsewhere; `owner` is its user and group."""
    try:
        fd = os.open(path, _WRITE | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        fd = _emptied(path, mode)
    try:
        _write_all(fd, data)
        os.fchmod(fd, mode)
        os.fchown(fd, owner, owner)
    finally:
        os.close(fd)


def _emptied(path: str | os.PathLike[str], mode: int) -> int:
    """Open the regular file at `path` without its content; a new one replaces anything else."""
    try:
        fd = os.open(path, _WRITE | os.O_NONBLOCK | os.O_TRUNC)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    except OSError:  # it is not a regular file, which is found out below
        pass
    _clear(path)
    return os.open(path, _WRITE | os.O_CREAT | os.O_EXCL, mode)


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
