"""Network namespaces that outlive processes, as ip-netns(8) keeps them: bind mounts under /run/netns.

A namespace lives as long as a process, a descriptor or a mount holds it. setns(2) moves one thread, so what has to
happen inside a namespace happens in `call_in`: in the calling thread, which comes back, or, since the main thread's
namespace is what /proc/self shows to everybody, in a thread of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from insula.kernel import linux

DIRECTORY = Path("/run/netns")
_MINE = "/proc/thread-self/ns/net"
T = TypeVar("T")


def call_in(netns: int, function: Callable[[], T]) -> T:
    """What `function` returns when it is called in the namespace behind the descriptor."""
    return _away(lambda: linux.setns(netns, linux.CLONE_NEWNET), function)


def call_in_new(function: Callable[[], T]) -> T:
    """What `function` returns when it is called in a new namespace, which goes when nothing holds it."""
    return _away(lambda: linux.unshare(linux.CLONE_NEWNET), function)


def _away(leave: Callable[[], None], function: Callable[[], T]) -> T:
    if threading.current_thread() is threading.main_thread():
        return _in_thread(lambda: _away(leave, function))
    home = os.open(_MINE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        leave()
        try:
            return function()
        finally:
            linux.setns(home, linux.CLONE_NEWNET)
    finally:
        os.close(home)


def _in_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def open_named(path: Path) -> int | None:
    """A descriptor of the namespace kept at `path`, None if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(fd).st_dev == os.stat(_MINE).st_dev:  # nsfs has one device number
        return fd
    os.close(fd)  # the file is there, but nothing is mounted on it: we were killed between the two
    return None


def exists(path: Path) -> bool:
    """Whether a namespace is kept at `path`."""
    fd = open_named(path)
    if fd is not None:
        os.close(fd)
    return fd is not None


def create(path: Path) -> None:
    """Keep a new namespace at `path` unless there is one. `DIRECTORY` must be prepared."""
    if not exists(path):
        path.touch(mode=0o444)
        call_in_new(lambda: linux.mount(_MINE, path, None, linux.MS_BIND))


def remove(path: Path) -> None:
    """Let go of the namespace kept at `path`; it ends when no process and no descriptor holds it either."""
    while (fd := open_named(path)) is not None:
        os.close(fd)
        linux.umount2(path, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    path.unlink(missing_ok=True)


def prepare_directory() -> bool:
    """Make /run/netns a shared mount as ip-netns(8) does, else it would do so later on top of ours. True if we did."""
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        linux.mount(None, DIRECTORY, None, linux.MS_SHARED | linux.MS_REC)
        return False
    except OSError:  # EINVAL: no mount yet
        linux.mount(DIRECTORY, DIRECTORY, None, linux.MS_BIND | linux.MS_REC)
        linux.mount(None, DIRECTORY, None, linux.MS_SHARED | linux.MS_REC)
        return True


def release_directory() -> None:
    """Undo `prepare_directory` unless somebody else keeps a namespace there."""
    if DIRECTORY.is_dir() and not any(DIRECTORY.iterdir()):
        linux.umount2(DIRECTORY, linux.UMOUNT_NOFOLLOW)
        if not any(DIRECTORY.iterdir()):
            DIRECTORY.rmdir()
