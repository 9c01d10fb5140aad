"""Races: the meaning of a path changes between its check and its use."""

from __future__ import annotations

import ctypes
import os
import time

AT_FDCWD, RENAME_EXCHANGE, MS_BIND = -100, 2, 4096
_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: str, other: str, seconds: float, ready: str = "") -> int:
    """Swaps two names as fast as it can, renameat2(2) with RENAME_EXCHANGE: each moment one of them is what it was.

    It ends early once there is a file whose name is that of `ready` and ``.stop``.
    """
    first, second = one.encode(), other.encode()
    if ready:
        open(ready, "w").close()
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end and not (ready and os.path.exists(f"{ready}.stop")):
        for _ in range(100):
            if _libc.renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE):
                raise OSError(ctypes.get_errno(), "renameat2")
        count += 100
    return count


def prepare(directory: str, target: str) -> int:
    """A directory `box` with a file in it, and a symbolic link `link` to `target`, to be exchanged."""
    os.makedirs(f"{directory}/box", exist_ok=True)
    with open(f"{directory}/box/secret", "w") as file:
        file.write("the container's own")
    os.symlink(target, f"{directory}/link")
    return 0


def cover(source: str, directory: str) -> list[str]:
    """Binds `source` over every name that comes to be in a directory, until there is a file `stop` beside that.

    A file `covered` beside the directory tells when the first one is.
    """
    covered: list[str] = []
    while not os.path.exists(f"{directory}.stop"):
        for name in os.listdir(directory):
            if name in covered:
                continue
            if _libc.mount(source.encode(), f"{directory}/{name}".encode(), None, MS_BIND, None):
                raise OSError(ctypes.get_errno(), "mount")
            covered.append(name)
            open(f"{directory}.covered", "w").close()
    return covered


def bind(source: str, target: str) -> int:
    """Binds one file or directory over another."""
    if _libc.mount(source.encode(), target.encode(), None, MS_BIND, None):
        raise OSError(ctypes.get_errno(), "mount")
    return 0
