"""Temporary directories that vanish with their owner, also when that is killed.

A staging directory is locked (flock(2) on the directory itself) for as long as it is used. A lock dies with
its process, so that whoever finds a staging directory that can be locked knows that nobody uses it, and
removes it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from insula.kernel import trees


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A new locked directory inside `directory`, removed with all that is in it when the block ends."""
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
            if path.exists():  # else a sweep was faster
                return path, lock
        os.close(lock)


def sweep(directory: Path) -> None:
    """Removes the staging directories in `directory` that nobody uses any more."""
    for path in directory.iterdir():
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError:  # not a directory: nothing of ours, and nobody uses it
            remove(path)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def remove(path: Path) -> None:
    """Remove a tree, however deep. What can't be removed now is found by the next sweep."""
    with suppress(OSError):
        trees.remove(path)


def disk_usage(path: Path) -> int:
    """The bytes that a tree takes on the disk (du(1))."""
    answer = subprocess.run(["du", "-s", "-B1", "--", str(path)], capture_output=True, check=False, text=True).stdout
    return int(answer.split()[0]) if answer else 0
