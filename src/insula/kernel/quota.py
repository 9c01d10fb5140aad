"""Project quotas: limits on the blocks and inodes that a tree of files takes of its file system (quotactl(2)).

Every inode of ext4 and xfs has a *project ID*, a number beside its owner's. The file system counts blocks and inodes
for each ID, and refuses what would exceed the ID's hard limits: with EDQUOT (ext4) or ENOSPC (xfs). Unlike quotas of
users they belong to a tree, whoever writes in it.

A directory with FS_XFLAG_PROJINHERIT gives its own ID to what is made in it. Files can't be linked or renamed into a
directory with that flag and another ID (EXDEV). Only the initial user namespace can change an ID: root of a container
can read its own. statvfs(2) of a directory with the flag shows the limits in place of the size of the disk.

Root with CAP_SYS_RESOURCE is above the limits of ext4, but not of xfs. `without_privilege` gives it up for a while.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from insula.kernel import capabilities, libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

REFUSALS: Final = (errno.EDQUOT, errno.ENOSPC)
"""The errors of a write beyond a limit."""

BLOCK: Final = 1024
"""Bytes: the unit in which the kernel takes limits of blocks."""

# linux/quota.h
_PRJQUOTA: Final = 2
_Q_GETQUOTA: Final = 0x800007
_Q_SETQUOTA: Final = 0x800008
_QIF_LIMITS: Final = 1 | 4  # those of blocks and inodes
_DQBLK: Final = struct.Struct("8QI4x")  # struct if_dqblk

# linux/fs.h
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
_FS_XFLAG_PROJINHERIT: Final = 0x200
_FSXATTR: Final = struct.Struct("5I8x")  # struct fsxattr

_QUOTACTL_FD: Final = 443
_QUOTACTL: Final = {"x86_64": 179, "aarch64": 60}


class ProjectUsage:
    """The blocks and inodes of one project: bytes and numbers in use, and the hard limits; None is no limit."""

    __slots__ = ("inodes", "inodes_limit", "space", "space_limit")

    def __init__(self, space: int, inodes: int, space_limit: int | None, inodes_limit: int | None) -> None:
        self.space, self.inodes, self.space_limit, self.inodes_limit = space, inodes, space_limit, inodes_limit


def get_project(fd: int) -> tuple[int, bool]:
    """FS_IOC_FSGETXATTR: the project ID of an open file or directory, and whether what is made in it inherits that."""
    found = _FSXATTR.unpack(fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
    return found[3], bool(found[0] & _FS_XFLAG_PROJINHERIT)


def set_project(fd: int, project: int, *, inherit: bool) -> None:
    """FS_IOC_FSSETXATTR: set the project ID of an open file or directory, and of what will be made in it.

    The other attributes stay as they are. Needs CAP_FOWNER in the initial user namespace. OSError: EOPNOTSUPP or ENOTTY
    if the file system has no such IDs, EDQUOT or ENOSPC if the project has no room for it.
    """
    before = _FSXATTR.unpack(fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
    flags = before[0] & ~_FS_XFLAG_PROJINHERIT | (_FS_XFLAG_PROJINHERIT if inherit else 0)
    fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(flags, before[1], before[2], project, before[4]))


def get_usage(fd: int, project: int) -> ProjectUsage:
    """Q_GETQUOTA: what a project has of the file system of `fd`. OSError: ESRCH if that has no project quotas."""
    data = libc.buffer(_DQBLK.size)
    try:
        _quotactl(fd, _Q_GETQUOTA, project, data)
    except FileNotFoundError:  # xfs has no record of a project that has nothing
        return ProjectUsage(0, 0, None, None)
    space_limit, _, space, inodes_limit, _, inodes, *_ = _DQBLK.unpack(data.raw)
    return ProjectUsage(space, inodes, space_limit * BLOCK or None, inodes_limit or None)


def set_limits(fd: int, project: int, space: int | None, inodes: int | None) -> None:
    """Q_SETQUOTA: set the hard limits of a project, in bytes (rounded down to KiB) and inodes; None is no limit.

    Limits below the usage are allowed: then nothing can be added. Needs CAP_SYS_ADMIN. OSError: ESRCH.
    """
    blocks = 0 if space is None else max(1, space // BLOCK)
    data = libc.buffer(_DQBLK.pack(blocks, 0, 0, inodes or 0, 0, 0, 0, 0, _QIF_LIMITS))
    _quotactl(fd, _Q_SETQUOTA, project, data)


def _quotactl(fd: int, command: int, project: int, data: libc.Buffer) -> None:
    """quotactl_fd(2); on kernels before Linux 5.14 quotactl(2)."""
    long, what = libc.Long, command << 8 | _PRJQUOTA
    try:
        libc.check(libc.syscall(long(_QUOTACTL_FD), long(fd), long(what), long(project), data), "quotactl_fd")
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        _quotactl_by_device(fd, what, project, data)


def _quotactl_by_device(fd: int, what: int, project: int, data: libc.Buffer) -> None:
    """quotactl(2), which names the file system by its block device."""
    long, device = libc.Long, os.fstat(fd).st_dev
    path = f"/dev/block/{os.major(device)}:{os.minor(device)}".encode()
    number = _QUOTACTL.get(os.uname().machine, -1)
    libc.check(libc.syscall(long(number), long(what), path, long(project), data), "quotactl", path.decode())


def without_privilege() -> capabilities.Lowered:
    """Take CAP_SYS_RESOURCE from the calling thread for a while, so that quotas of ext4 hold for it as well.

    Capabilities belong to a thread: other threads of the process keep theirs.
    """
    return capabilities.Lowered(capabilities.to_mask(["SYS_RESOURCE"]))
