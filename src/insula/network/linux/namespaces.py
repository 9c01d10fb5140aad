"""Named network namespaces, which outlive processes: bind mounts under /run/netns, as ip-netns(8) makes them.

A namespace lives as long as a process, a descriptor or a mount refers to it.
"""

from __future__ import annotations

import os
from pathlib import Path

from insula.kernel import syscalls
from insula.kernel.netns import OWN, call_in_new

DIRECTORY = Path("/run/netns")


def open_named(path: Path) -> int | None:
    """Open the namespace mounted at `path`; None if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(fd).st_dev == os.stat(OWN).st_dev:  # nsfs has one device number
        return fd
    os.close(fd)  # the file exists and nothing is mounted on it: insulad was killed between the two steps
    return None


def exists(path: Path) -> bool:
    """Whether a namespace is mounted at `path`."""
    fd = open_named(path)
    if fd is not None:
        os.close(fd)
    return fd is not None


def create(path: Path) -> None:
    """Mount a new namespace at `path` unless there is one. `DIRECTORY` must be prepared."""
    if not exists(path):
        path.touch(mode=0o444)
        call_in_new(lambda: syscalls.mount(OWN, path, None, syscalls.MS_BIND))


def remove(path: Path) -> None:
    """Unmount the namespace at `path`; it ends when no process and no descriptor refers to it either."""
    while (fd := open_named(path)) is not None:
        os.close(fd)
        syscalls.umount2(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    path.unlink(missing_ok=True)


def prepare_directory() -> bool:
    """Make /run/netns a shared mount, or ip-netns(8) would do so later over our mounts. True if it was not one."""
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        syscalls.mount(None, DIRECTORY, None, syscalls.MS_SHARED | syscalls.MS_REC)
        return False
    except OSError:  # EINVAL: no mount yet
        syscalls.mount(DIRECTORY, DIRECTORY, None, syscalls.MS_BIND | syscalls.MS_REC)
        syscalls.mount(None, DIRECTORY, None, syscalls.MS_SHARED | syscalls.MS_REC)
        return True


def release_directory() -> None:
    """Undo `prepare_directory` unless another program's namespace is mounted there."""
    if DIRECTORY.is_dir() and not any(DIRECTORY.iterdir()):
        syscalls.umount2(DIRECTORY, syscalls.UMOUNT_NOFOLLOW)
        if not any(DIRECTORY.iterdir()):
            DIRECTORY.rmdir()
