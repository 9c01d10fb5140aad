"""The log and its rotated files: `audit.log` is the newest, `audit.log.1` the one before it, and so on.

Other programs may rename or remove them at any time (logrotate(8) need not send a signal).
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple

from insula.audit.chain import OVERHEAD, parse

LONGEST_LINE = 64 << 10
"""Bytes of the longest line for a reader."""
_OPEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK
_MODE = 0o640
_ATTEMPTS = 100  # of a reader to open the files in one order, while they are rotated
_TAIL = 4 * (LONGEST_LINE + OVERHEAD)


def numbered(path: Path, number: int) -> Path:
    """Return the path of the rotated file with this number; 0 is the log itself."""
    return path.with_name(f"{path.name}.{number}") if number else path


def open_for_writing(path: Path, group: int | None) -> int:
    """Open the log, or make it (mode 0640, for `group`). OSError, also for what is no regular file."""
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    try:
        fd = os.open(path, _OPEN | os.O_EXCL, _MODE)
        os.fchmod(fd, _MODE)
        if group is not None:
            os.fchown(fd, -1, group)
    except FileExistsError:
        fd = os.open(path, _OPEN)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "it is not a regular file")
    return fd


def open_for_reading(path: Path) -> BinaryIO:
    """Open a file of the log. OSError, also for what is no regular file: a FIFO would block."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "it is not a regular file")
    return open(fd, "rb")


class OpenFile(NamedTuple):
    """An open file: as long as it is open, no other file has these numbers."""

    device: int
    inode: int

    def size(self, path: Path) -> int | None:
        """Return its size in bytes if it is still at `path`, else None."""
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return None
        return found.st_size if (found.st_dev, found.st_ino) == self else None


def rotate(path: Path, files: int) -> None:
    """Rename the log and the rotated files, each to the next number; the last one of `files` is lost. OSError."""
    for number in range(files, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            os.rename(numbered(path, number - 1), numbered(path, number))
    if not files:
        os.unlink(path)


def open_all(path: Path, files: int, stack: contextlib.ExitStack) -> list[BinaryIO]:
    """Open the log and its rotated files, newest first, so that a file that is renamed meanwhile is not missed.

    If the first is renamed meanwhile, all are opened again: another rotation may have begun then, and have removed a
    file of which only a newer one tells.
    """
    for _ in range(_ATTEMPTS):
        stack.close()
        opened: dict[int, BinaryIO] = {}  # by inode
        first = None
        for number in range(files + 1):
            with contextlib.suppress(OSError):
                file = stack.enter_context(open_for_reading(numbered(path, number)))
                inode = os.fstat(file.fileno()).st_ino
                first = first or (inode, number)
                opened.setdefault(inode, file)
        if first is None or _is_at(path, *first):
            break
    return list(opened.values())


def _is_at(path: Path, inode: int, number: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return numbered(path, number).stat().st_ino == inode
    return False


def last_line(path: Path) -> tuple[bytes, bytes] | None:
    """Return the last sealed line of a file, and what follows it; None if the end of the file has none. OSError."""
    with open_for_reading(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        data = file.read(_TAIL)
    end = len(data)
    while (newline := data.rfind(b"\n", 0, end)) >= 0:
        start = data.rfind(b"\n", 0, newline) + 1
        if parse(data[start : newline + 1]):
            return data[start : newline + 1], data[newline + 1 :]
        end = newline
    return None


def first_seq(path: Path) -> int | None:
    """Return the number of a file's first line; None if that is not sealed, or there is no such file."""
    with contextlib.suppress(OSError), open_for_reading(path) as file:
        line = parse(file.readline(LONGEST_LINE + OVERHEAD))
        return line.seq if line else None
    return None
