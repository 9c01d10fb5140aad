"""System calls that Python's `os` lacks, one function each, named as in section 2 of the manual.

They raise OSError with the kernel's errno, the call's name, and the object that it was called on. The zygote imports
this file before it forks containers, so it imports only ctypes.
"""

from __future__ import annotations

import errno
import os
import struct
import sys

from insula.kernel import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from insula.kernel.libc import Buffer

# sched.h: what clone3(2), unshare(2) and setns(2) make or join
CLONE_NEWTIME: Final = 0x00000080
CLONE_PIDFD: Final = 0x00001000
CLONE_PARENT: Final = 0x00008000
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000
CLONE_INTO_CGROUP: Final = 0x200000000

# mount.h: mount(2) and umount2(2)
MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_SYNCHRONOUS: Final = 16
MS_REMOUNT: Final = 32
MS_DIRSYNC: Final = 128
MS_NOSYMFOLLOW: Final = 256
MS_NOATIME: Final = 1024
MS_NODIRATIME: Final = 2048
MS_BIND: Final = 4096
MS_MOVE: Final = 8192
MS_REC: Final = 16384
MS_SILENT: Final = 32768
MS_UNBINDABLE: Final = 1 << 17
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MS_SHARED: Final = 1 << 20
MS_RELATIME: Final = 1 << 21
MS_STRICTATIME: Final = 1 << 24
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

# fcntl.h, and the mount API of Linux 5.2: open_tree(2), move_mount(2), fsopen(2), fsconfig(2), mount_setattr(2)
AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_NO_AUTOMOUNT: Final = 0x800
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000
OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
FSOPEN_CLOEXEC: Final = 1
FSMOUNT_CLOEXEC: Final = 1
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_SET_FD: Final = 5
FSCONFIG_CMD_CREATE: Final = 6
MOUNT_ATTR_RDONLY: Final = 0x01
MOUNT_ATTR_NOSUID: Final = 0x02
MOUNT_ATTR_NODEV: Final = 0x04
MOUNT_ATTR_NOEXEC: Final = 0x08
MOUNT_ATTR_NOATIME: Final = 0x10
MOUNT_ATTR_STRICTATIME: Final = 0x20
MOUNT_ATTR_NODIRATIME: Final = 0x80
MOUNT_ATTR__ATIME: Final = 0x70  # the field of the access time: 0 is relatime
MOUNT_ATTR_IDMAP: Final = 0x00100000
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x00200000

# openat2.h: how openat2(2) may resolve a path
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

# prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_SET_NAME: Final = 15
PR_CAPBSET_DROP: Final = 24
PR_SET_SECUREBITS: Final = 28
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47

SECBIT_NO_SETUID_FIXUP: Final = 1 << 2

CLOSE_RANGE_CLOEXEC: Final = 4

RENAME_EXCHANGE: Final = 1 << 1

RB_AUTOBOOT: Final = 0x01234567
RB_POWER_OFF: Final = 0x4321FEDC
KEYCTL_JOIN_SESSION_KEYRING: Final = 1

# syscall numbers; those from 424 on are the same on all architectures
_OLD: Final = {
    "x86_64": {
        "mount": 165,
        "umount2": 166,
        "pivot_root": 155,
        "unshare": 272,
        "setns": 308,
        "keyctl": 250,
        "getcwd": 79,
        "prlimit64": 302,
        "fchownat": 260,
        "setresuid": 117,
        "finit_module": 313,
        "reboot": 169,
        "renameat2": 316,
    },
    "aarch64": {
        "mount": 40,
        "umount2": 39,
        "pivot_root": 41,
        "unshare": 97,
        "setns": 268,
        "keyctl": 219,
        "getcwd": 17,
        "prlimit64": 261,
        "fchownat": 54,
        "setresuid": 147,
        "finit_module": 273,
        "reboot": 142,
        "renameat2": 276,
    },
}
_NR: Final = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    **_OLD.get(os.uname().machine, {}),
}

_syscall, _prctl, _madvise, _long = libc.syscall, libc.function("prctl"), libc.function("madvise"), libc.Long


def _call(name: str, *args: int | bytes | Buffer | None, on: object = "") -> int:
    """Call syscall(2): integers are passed as long, bytes as char pointers; a negative result raises OSError."""
    number = _NR.get(name)
    if number is None:
        raise OSError(38, f"{name}: not known on {os.uname().machine}")
    result = _syscall(_long(number), *(_long(a) if isinstance(a, int) else a for a in args))
    return libc.check(result, name, on)


def _path(path: str | os.PathLike[str]) -> bytes:
    return os.fsencode(path)


# -- processes and namespaces ---------------------------------------------------------------------

_CLONE_ARGS = struct.Struct("11Q")
_after_fork = libc.python("PyOS_AfterFork_Child")


def clone3(flags: int, *, cgroup: int | None = None) -> tuple[int, int]:
    """clone3(2): fork into new namespaces; returns (pid, pidfd) in the parent and (0, -1) in the child.

    `cgroup` is a descriptor of a cgroup v2 directory in which the child starts. The caller must have a single thread.
    """
    pidfd = libc.buffer(4)
    flags |= CLONE_PIDFD | (CLONE_INTO_CGROUP if cgroup is not None else 0)
    sigchld = 17
    args = _CLONE_ARGS.pack(flags, libc.addressof(pidfd), 0, 0, sigchld, 0, 0, 0, 0, 0, cgroup or 0)
    if flags & CLONE_PARENT:  # the child's exit signal is then that of its parent, and must be 0 here
        args = _CLONE_ARGS.pack(flags, libc.addressof(pidfd), 0, 0, 0, 0, 0, 0, 0, 0, cgroup or 0)
    pid = _call("clone3", args, len(args))
    if pid == 0:
        _after_fork()
        return 0, -1
    return pid, int.from_bytes(pidfd.raw, sys.byteorder)


def unshare(flags: int) -> None:
    """unshare(2): move the calling thread into new namespaces."""
    _call("unshare", flags)


def setns(fd: int, flags: int) -> None:
    """setns(2): move the calling thread into the namespace behind `fd`, or into those of a pidfd's process."""
    _call("setns", fd, flags)


def set_thread_users(real: int, effective: int, saved: int) -> None:
    """setresuid(2) for the calling thread only; the C library's function changes all threads of the process."""
    _call("setresuid", real, effective, saved)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): a copy of a descriptor of another process, close-on-exec."""
    return _call("pidfd_getfd", pidfd, fd, 0)


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2)."""
    result: int = _prctl(option, _long(arg2), _long(arg3), _long(arg4), _long(arg5))
    return libc.check(result, f"prctl({option})")


_RLIMIT = struct.Struct("2Q")


def prlimit(resource: int, limits: tuple[int, int] | None = None, pid: int = 0) -> tuple[int, int]:
    """prlimit(2): return the soft and hard limit, all ones for unlimited, and set new ones if `limits` is given."""
    before = libc.buffer(_RLIMIT.size)
    _call("prlimit64", pid, resource, _RLIMIT.pack(*limits) if limits else None, before)
    soft, hard = _RLIMIT.unpack(before.raw)
    return soft, hard


MADV_POPULATE_WRITE: Final = 23


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2) about memory of the calling process."""
    libc.check(_madvise(_long(address), _long(length), advice), "madvise")


def set_name(name: str) -> None:
    """PR_SET_NAME: set the name that ps(1) shows in the comm column, at most 15 bytes."""
    buffer = libc.buffer(name.encode()[:15] + b"\0")
    prctl(PR_SET_NAME, libc.addressof(buffer))


def setdomainname(name: str) -> None:
    """setdomainname(2): set the NIS domain name of the UTS namespace."""
    libc.check(libc.function("setdomainname")(name.encode(), _long(len(name.encode()))), "setdomainname", name)


def chown(fd: int, uid: int, gid: int) -> None:
    """fchownat(2) with AT_EMPTY_PATH: set the owner of the file behind `fd`, which may be an O_PATH descriptor."""
    _call("fchownat", fd, b"", uid, gid, AT_EMPTY_PATH)


def close_range(first: int, last: int, flags: int = 0) -> None:
    """close_range(2): close every descriptor from `first` to `last`, or with CLOSE_RANGE_CLOEXEC set close-on-exec."""
    _call("close_range", first, last, flags)


def join_session_keyring(name: str | None = None) -> None:
    """keyctl(2) KEYCTL_JOIN_SESSION_KEYRING: replace the inherited session keyring, if the kernel has keyrings.

    With a name, an existing keyring of that name is joined; without one, a new anonymous keyring is made.
    """
    try:
        _call("keyctl", KEYCTL_JOIN_SESSION_KEYRING, name.encode() if name else None)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # also the result of the seccomp filter of a nesting container
            raise


_PATH_MAX = 4096
libc.buffer(_PATH_MAX)  # its type is made now, and not by each child


def getcwd() -> str:
    """getcwd(2): FileNotFoundError if the directory is outside of the root, or removed.

    os.getcwd() would not fail: the C library then walks up ``..`` until a directory looks like the root.
    """
    answer = libc.buffer(_PATH_MAX)
    length = _call("getcwd", answer, len(answer))
    if not answer.raw.startswith(b"/"):  # "(unreachable)/…"
        raise FileNotFoundError(2, "getcwd: it is outside of the root")
    return os.fsdecode(answer.raw[: length - 1])


# -- mounts, the classic calls ---------------------------------------------------------------------


def mount(
    source: str | os.PathLike[str] | None,
    target: str | os.PathLike[str],
    fstype: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """mount(2)."""
    _call(
        "mount",
        _path(source) if source is not None else None,
        _path(target),
        fstype.encode() if fstype is not None else None,
        flags,
        os.fsencode(data) if data is not None else None,
        on=target,
    )


def umount2(target: str | os.PathLike[str], flags: int = 0) -> None:
    """umount2(2)."""
    _call("umount2", _path(target), flags, on=target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _call("pivot_root", _path(new_root), _path(put_old), on=new_root)


# -- mounts as file descriptors (Linux 5.2) ---------------------------------------------------------------------


def open_tree(dirfd: int, path: str | os.PathLike[str], flags: int) -> int:
    """open_tree(2): open a mount, or with OPEN_TREE_CLONE make a detached copy, unmounted when it is closed."""
    return _call("open_tree", dirfd, _path(path), flags | OPEN_TREE_CLOEXEC, on=path)


def move_mount(from_fd: int, to_dirfd: int, to_path: str, flags: int = MOVE_MOUNT_F_EMPTY_PATH) -> None:
    """move_mount(2): attach the detached mount `from_fd` at a path."""
    _call("move_mount", from_fd, b"", to_dirfd, _path(to_path), flags, on=to_path)


def fsopen(fstype: str) -> int:
    """fsopen(2): make a file system context."""
    return _call("fsopen", fstype.encode(), FSOPEN_CLOEXEC, on=fstype)


def fsconfig(fd: int, command: int, key: str | None = None, value: str | None = None, aux: int = 0) -> None:
    """fsconfig(2): set a parameter of the context, or create its superblock."""
    _call(
        "fsconfig",
        fd,
        command,
        key.encode() if key is not None else None,
        os.fsencode(value) if value is not None else None,
        aux,
        on=key or "create",
    )


def fsmount(fd: int, attributes: int = 0) -> int:
    """fsmount(2): make a detached mount of the context's superblock."""
    return _call("fsmount", fd, FSMOUNT_CLOEXEC, attributes)


_MOUNT_ATTR = struct.Struct("4Q")


def mount_setattr(
    dirfd: int,
    path: str,
    *,
    set_: int = 0,
    clear: int = 0,
    propagation: int = 0,
    userns: int = 0,
    flags: int = AT_EMPTY_PATH,
) -> None:
    """mount_setattr(2): change attributes of a mount; `userns` is the namespace of MOUNT_ATTR_IDMAP."""
    attr = _MOUNT_ATTR.pack(set_, clear, propagation, userns)
    _call("mount_setattr", dirfd, _path(path), flags, attr, len(attr), on=path)


_OPEN_HOW = struct.Struct("3Q")


_ATTEMPTS = 1000


def exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
    """renameat2(2) with RENAME_EXCHANGE: have each of two names be of what the other one was of, in one step."""
    _call("renameat2", AT_FDCWD, _path(one), AT_FDCWD, _path(other), RENAME_EXCHANGE, on=os.fspath(one))


def reboot(command: int) -> None:
    """Turn the machine off, or start it again (reboot(2)); `command` is RB_POWER_OFF or RB_AUTOBOOT."""
    _call("reboot", 0xFEE1DEAD, 672274793, command, None)


def finit_module(fd: int, parameters: str = "") -> None:
    """Load the kernel module in a file (finit_module(2))."""
    _call("finit_module", fd, parameters.encode() + b"\0", 0)


def openat2(dirfd: int, path: str | os.PathLike[str], flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): open a path with restrictions on its resolution; always close-on-exec.

    With RESOLVE_BENEATH or RESOLVE_IN_ROOT the kernel fails with EAGAIN on a ``..`` if anything on the host was renamed
    or mounted meanwhile. The call is then repeated, up to 1000 times.
    """
    for _ in range(_ATTEMPTS):
        try:
            return openat2_once(dirfd, path, flags, mode=mode, resolve=resolve)
        except BlockingIOError as error:
            refused = error
    raise refused


def openat2_once(dirfd: int, path: str | os.PathLike[str], flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """Call openat2(2) once; BlockingIOError for EAGAIN."""
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, resolve)
    return _call("openat2", dirfd, _path(path), how, len(how), on=path)


def syncfs(fd: int) -> None:
    """syncfs(2): write all cached data of the file system of `fd` to disk."""
    libc.check(libc.function("syncfs")(fd), "syncfs")
