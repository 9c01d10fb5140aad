"""Copies of files: they share the blocks where the file system can (ioctl_ficlonerange(2)), else holes stay holes."""

from __future__ import annotations

import errno
import fcntl
import os

_FICLONE = 0x40049409
_CHUNK = 8 << 20
_NOT_SHARED = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV})
_NOT_IN_KERNEL = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


def copy(source: int, target: int) -> bool:
    """Copy all of a file into an empty one, both as descriptors. Return whether they share their blocks. OSError."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return True
    except OSError as error:
        if error.errno not in _NOT_SHARED:
            raise
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
            at = min(os.lseek(source, begin, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        _copy_range(source, target, begin, at)
    return False


def _copy_range(source: int, target: int, begin: int, end: int) -> None:
    while begin < end:
        size = min(_CHUNK, end - begin)
        try:
            copied = os.copy_file_range(source, target, size, begin, begin)
        except OSError as error:
            if error.errno not in _NOT_IN_KERNEL:
                raise
            copied = os.pwrite(target, os.pread(source, size, begin), begin)
        if not copied:
            raise OSError(errno.EIO, "the file was cut off while it was copied")
        begin += copied
