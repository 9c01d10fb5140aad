"""Temporary directories that are removed when their owner ends, also when it is killed.

A staging directory is locked (flock(2) on the directory itself) while it is used. The lock is released when its process
ends, so a staging directory that can be locked is unused, and a sweep removes it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from insula.kernel import trees


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Make a locked directory inside `directory`, which is removed with its content when the block ends."""
    path, lock = _make(directory)
    try:
        yield path
    finally:
        remove(path)
        os.close(lock)


def _make(directory: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(dir=directory))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():  # otherwise a sweep has removed it meanwhile
                return path, lock
        os.close(lock)


def sweep(directory: Path) -> None:
    """Remove the unused staging directories in `directory`."""
    for path in directory.iterdir():
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError:  # not a directory: not a staging directory
            remove(path)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def remove_later(directory: Path, paths: Iterable[Path]) -> None:
    """Move files and trees to a staging directory inside `directory`, which a thread removes."""
    place, lock = _make(directory)
    for number, path in enumerate(paths):
        path.rename(place / str(number))

    def work() -> None:
        remove(place)
        os.close(lock)

    threading.Thread(target=work, daemon=True).start()


def remove(path: Path) -> None:
    """Remove a tree of any depth. A failure is left to the next sweep."""
    with suppress(OSError):
        trees.remove(path)


def disk_usage(path: Path) -> int:
    """Return the bytes that a tree uses on the disk (du(1))."""
    answer = subprocess.run(["du", "-s", "-B1", "--", str(path)], capture_output=True, check=False, text=True).stdout
    return int(answer.split()[0]) if answer else 0
