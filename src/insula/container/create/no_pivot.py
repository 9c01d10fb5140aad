"""Change the root without pivot_root(2) (`--no-pivot`), for a host whose root file system is its initial ramdisk.

The old root then stays in the mount namespace, below the new one, with all mounts in it. No process inside can reach
them. But the kernel lets a user namespace mount a new /proc or /sys if the mount namespace has one with nothing covered
(mount_too_revealing in fs/namespace.c), and the host's are such. So each of them is unmounted before, as runc does. In
a user namespace, where single mounts can't be unmounted (mount_namespaces(7)), they are covered instead; the kernel
checks that in every namespace below. The old root's mounts become private, so that later mounts of the host don't
appear.
"""

from __future__ import annotations

import errno
import os

from insula.kernel import mounts, syscalls

_LIMIT = 1000  # mounts of proc and sysfs
_COVER = (
    syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
)


def enter(root: int) -> None:
    """Make the attached mount `root` the root of the process, and of processes that enter its mount namespace later.

    OSError with EPERM if a /proc or /sys of the host can be neither unmounted nor covered.
    """
    table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)  # stays readable without /proc
    try:
        own = _mount_id(root)
        syscalls.move_mount(root, syscalls.AT_FDCWD, "/")  # the process's own root is still the one below
        _part(_read(table), own)
        _hide_all(table, own)
    finally:
        os.close(table)
    os.fchdir(root)
    os.chroot(".")
    os.chdir("/")


def _part(table: bytes, own: int) -> None:
    """Make private the mounts that are not below the mount with the ID `own` and can be reached by their paths."""
    for mount in _others(table, own):
        try:
            syscalls.mount(None, mount.path, None, syscalls.MS_PRIVATE)
        except OSError:
            continue


def _hide_all(table: int, own: int) -> None:
    """Unmount or cover each complete proc and sysfs that is not below the mount with the ID `own`."""
    covered: set[int] = set()
    for _ in range(_LIMIT):
        left = [mount for mount in _others(_read(table), own) if mount.reveals and mount.number not in covered]
        if not left:
            return
        mount = left[-1]  # the latest: it may be over others
        try:
            syscalls.umount2(mount.path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):  # it is locked
                raise
            cover = mounts.filesystem("tmpfs", ("size=4096", "mode=555"), _COVER, "tmpfs")
            syscalls.move_mount(cover, syscalls.AT_FDCWD, mount.path)
            os.close(cover)
            covered.add(mount.number)
    raise OSError(errno.EPERM, "the host's /proc and /sys can't be hidden without pivot_root")


class _Mount:
    """A line of proc_pid_mountinfo(5). `reveals`: it is a proc or sysfs as a whole."""

    __slots__ = ("number", "parent", "path", "reveals")

    def __init__(self, line: bytes) -> None:
        fields = line.split(b" ")
        self.number, self.parent = int(fields[0]), int(fields[1])
        self.path = os.fsdecode(_decode(fields[4]))
        self.reveals = fields[3] == b"/" and fields[fields.index(b"-") + 1] in (b"proc", b"sysfs")


def _others(table: bytes, own: int) -> list[_Mount]:
    """The mounts that don't lie below the one with the ID `own`, the latest last."""
    every = {mount.number: mount for mount in map(_Mount, table.splitlines())}

    def is_ours(mount: _Mount | None) -> bool:
        while mount and mount.number != own:  # the first mount of all is its own parent
            mount = every.get(mount.parent) if mount.parent != mount.number else None
        return mount is not None

    return [mount for mount in every.values() if not is_ours(mount)]


def _decode(path: bytes) -> bytes:
    for escape, byte in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        path = path.replace(escape, byte)
    return path


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(b"mnt_id:"))


def _read(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    parts = []
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    return b"".join(parts)
