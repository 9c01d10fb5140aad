"""tmpcopyup: a tmpfs that starts with a copy of the directory that it is mounted on (an option of runc's).

It can give a read-only root a writable /etc. The tree is copied before the tmpfs is attached. Its names come from a
hostile image, so each is opened relative to an open directory, and no link is followed.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import partial

_CHUNK = 1 << 20
_DEPTH = 200  # directories within directories; each holds two descriptors


def copy_up(source: int, target: int) -> None:
    """Copy all that is in the directory behind `source` into the one behind `target`, and its own attributes.

    OSError (ENAMETOOLONG) for more than 200 directories within each other.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    # the descriptor of a mount is O_PATH, and reads nothing
    _both(".", source, target, flags, flags, partial(_copy_directory, depth=0))


def _copy_directory(source: int, target: int, depth: int) -> None:
    if depth > _DEPTH:
        raise OSError(errno.ENAMETOOLONG, f"more than {_DEPTH} directories within each other")
    for name in os.listdir(source):
        found = os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=target)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            _both(name, source, target, flags, flags, partial(_copy_directory, depth=depth + 1))
            continue
        if kind == stat.S_IFREG:
            read = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            _both(name, source, target, read, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _copy_file)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
        else:  # sockets, FIFOs, and devices where the rights suffice
            os.mknod(name, found.st_mode, found.st_rdev, dir_fd=target)
            os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
    _copy_attributes(source, target)


def _both(name: str, source: int, target: int, read: int, write: int, copy: object) -> None:
    old = os.open(name, read, dir_fd=source)
    try:
        new = os.open(name, write, 0o600, dir_fd=target)
        try:
            copy(old, new)  # type: ignore[operator]
        finally:
            os.close(new)
    finally:
        os.close(old)


def _copy_file(source: int, target: int) -> None:
    if not stat.S_ISREG(os.fstat(source).st_mode):  # another file has come in its place
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    while os.sendfile(target, source, None, _CHUNK):
        pass
    _copy_attributes(source, target)


def _copy_attributes(source: int, target: int) -> None:
    found = os.fstat(source)
    os.fchown(target, found.st_uid, found.st_gid)
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    for name in os.listxattr(source):
        try:
            os.setxattr(target, name, os.getxattr(source, name))
        except OSError:  # tmpfs, or a user namespace, doesn't have all kinds
            continue
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
