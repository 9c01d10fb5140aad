"""Another root without pivot_root(2): `--no-pivot`, for a machine that runs from its first root file system, a ramdisk.

The old root then stays in the mount namespace, below the new one, with all that is mounted in it. Nobody inside sees
it, but the kernel does: it lets a user namespace mount a new /proc or /sys if one that hides nothing is anywhere in the
mount namespace (mount_too_revealing in fs/namespace.c), and the host's hide nothing. So each of them is unmounted
before, as runc does. Where the mounts of a user namespace can't be unmounted one by one (mount_namespaces(7)), they are
covered, which the kernel takes into account in every namespace below.
"""

from __future__ import annotations

import errno
import os

from insula.kernel import linux, mounts

_LIMIT = 1000  # mounts of proc and sysfs
_COVER = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOEXEC


def enter(root: int) -> None:
    """Make the attached mount `root` the root of the process, and of whoever enters its mount namespace.

    OSError with EPERM if a /proc or /sys of the host can be neither unmounted nor covered.
    """
    table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)  # stays readable without /proc
    try:
        own = _mount_id(root)
        linux.move_mount(root, linux.AT_FDCWD, "/")  # the process's own root is still the one below
        _hide_all(table, own)
    finally:
        os.close(table)
    os.fchdir(root)
    os.chroot(".")
    os.chdir("/")


def _hide_all(table: int, own: int) -> None:
    """Unmount or cover every whole proc and sysfs that doesn't lie below the mount with the ID `own`."""
    covered: set[int] = set()
    for _ in range(_LIMIT):
        left = [found for found in _revealing(_read(table), own) if found[0] not in covered]
        if not left:
            return
        number, path = left[-1]
        try:
            linux.umount2(os.fsdecode(path), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):  # it is locked
                raise
            cover = mounts.filesystem("tmpfs", ("size=4096", "mode=555"), _COVER, "tmpfs")
            linux.move_mount(cover, linux.AT_FDCWD, os.fsdecode(path))
            os.close(cover)
            covered.add(number)
    raise OSError(errno.EPERM, "the host's /proc and /sys can't be hidden without pivot_root")


def _revealing(table: bytes, own: int) -> list[tuple[int, bytes]]:
    """(ID, path) of what is to be hidden, the latest last, of a table as in proc_pid_mountinfo(5)."""
    ours = {own}
    found: list[tuple[int, bytes]] = []
    for line in table.splitlines():
        fields = line.split(b" ")
        number, parent, part, path = int(fields[0]), int(fields[1]), fields[3], fields[4]
        if parent in ours:
            ours.add(number)
        elif number != own and part == b"/" and fields[fields.index(b"-") + 1] in (b"proc", b"sysfs"):
            found.append((number, _decode(path)))
    return found


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
