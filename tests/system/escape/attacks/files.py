"""Files of the kernel and device nodes: access to one of them would give control of the host."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from tests.system.escape.attacks.calls import syscall

HELPERS = (
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/hotplug",
    "/proc/sys/fs/binfmt_misc/register",
    "/sys/kernel/uevent_helper",
    "/sys/kernel/security/apparmor/.load",
)
"""Each names a program that the kernel then starts as the host's root, outside of every container."""

MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096


def opened(path: str, flags: int = os.O_WRONLY) -> str:
    """Opens it and no more."""
    os.close(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC))
    return path


def read(path: str, size: int = 4096) -> str:
    """The first bytes of a file."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(fd, size).decode(errors="replace")
    finally:
        os.close(fd)


def write(path: str, text: str) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        return os.write(fd, text.encode())
    finally:
        os.close(fd)


def writable(*tops: str) -> list[str]:
    """Every file below that opens for writing and that some user may write to; those of processes are left out."""
    found = []
    for top in tops:
        for path, folders, files in os.walk(top):
            folders[:] = [name for name in folders if not name.isdigit() and name not in ("self", "thread-self")]
            for name in files:
                full = os.path.join(path, name)
                with contextlib.suppress(OSError):
                    mode = os.lstat(full).st_mode  # a masked file is /dev/null
                    if stat.S_ISREG(mode) and mode & 0o222:
                        found.append(opened(full))
    return found


def changed(*tops: str) -> list[str]:
    """Every directory below in which a file can be made."""
    found = []
    for top in tops:
        for path, folders, _ in os.walk(top):
            folders[:] = [name for name in folders if not name.isdigit() and name not in ("self", "thread-self")]
            with contextlib.suppress(OSError):
                os.close(os.open(f"{path}/insula-escape", os.O_CREAT | os.O_WRONLY, 0o600))
                os.unlink(f"{path}/insula-escape")
                found.append(path)
    return found


def read_only_no_more(path: str) -> str:
    """Remounts what is there for writing, as itself and as a bind mount."""
    for flags in (MS_REMOUNT, MS_REMOUNT | MS_BIND):
        try:
            syscall("mount", b"none", path.encode(), None, flags, None)
        except OSError as error:
            failure = error
        else:
            return path
    raise failure


def release_agent(directory: str) -> str:
    """CVE-2022-0492: a control group hierarchy of one's own, and in it the program that the host's root starts when a
    group becomes empty. Only the file is written here; it names no program."""
    os.makedirs(directory, exist_ok=True)
    syscall("mount", b"none", directory.encode(), b"cgroup", 0, b"none,name=insula-escape")
    try:
        write(f"{directory}/release_agent", "/no/such/program")
        return read(f"{directory}/release_agent").strip()
    finally:
        syscall("umount2", directory.encode(), 0)


def uncovered(path: str) -> str:
    """Files below the mount that masks `path`, after an unmount."""
    syscall("umount2", path.encode(), 0)
    with open(path, "rb") as file:
        return file.read(1 << 16).decode(errors="replace")


def another_proc(directory: str) -> str:
    """A second procfs, on which nothing is masked and nothing is read-only."""
    os.makedirs(directory, exist_ok=True)
    syscall("mount", b"proc", directory.encode(), b"proc", 0, None)
    return opened(f"{directory}/sys/kernel/core_pattern")


# -- device nodes ------------------------------------------------------------------------------------


def disks() -> list[tuple[int, int]]:
    """The numbers of the host's disks, which everybody may read."""
    with open("/proc/partitions") as file:
        rows = [line.split() for line in file][2:]
    return [(int(row[0]), int(row[1])) for row in rows]


def node(path: str, kind: str, major: int, minor: int) -> str:
    """mknod(2), then opens it."""
    number = os.makedev(major, minor)
    os.mknod(path, 0o666 | (stat.S_IFBLK if kind == "b" else stat.S_IFCHR), number)
    try:
        return opened(path, os.O_RDONLY)
    finally:
        os.unlink(path)


def nodes(*directories: str) -> list[str]:
    """Every node of memory, kernel log, kvm, fuse, tun and each disk that can be made in one of the places."""
    wanted = [("c", 1, 1), ("c", 1, 2), ("c", 1, 4), ("c", 1, 11), ("c", 10, 229), ("c", 10, 200), ("c", 10, 232)]
    wanted += [("b", *disk) for disk in disks()]
    made = []
    for directory in directories:
        for kind, major, minor in wanted:
            with contextlib.suppress(OSError):
                os.mknod(
                    f"{directory}/node",
                    0o666 | (stat.S_IFBLK if kind == "b" else stat.S_IFCHR),
                    os.makedev(major, minor),
                )
                made.append(f"{directory} {kind} {major}:{minor}")
                os.unlink(f"{directory}/node")
    return made


def devices_there() -> list[str]:
    """Every device node of the whole root, by number."""
    found = []
    for path, folders, files in os.walk("/"):
        if path == "/":
            folders[:] = [name for name in folders if name not in ("proc", "sys")]
        for name in files:
            status = os.lstat(os.path.join(path, name))
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                kind = "b" if stat.S_ISBLK(status.st_mode) else "c"
                found.append(f"{kind} {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
    return sorted(set(found))


def refusals(*paths: str) -> dict[str, str]:
    """The errno with which each is refused to be read."""
    found = {}
    for path in paths:
        try:
            opened(path, os.O_RDONLY)
            found[path] = ""
        except OSError as error:
            found[path] = errno.errorcode[error.errno or 0]
    return found


def spoil(path: str) -> dict[str, str]:
    """Takes "ro" off the mount at a path and tries to change the file; each way with what came of it."""

    def write() -> None:
        os.close(os.open(path, os.O_WRONLY))

    ways: dict[str, Callable[[], object]] = {
        "remount": lambda: syscall("mount", b"none", path.encode(), None, MS_REMOUNT | MS_BIND, None),
        "write": write,
        "truncate": lambda: os.truncate(path, 0),
        "chmod": lambda: os.chmod(path, 0o4777),
        "utime": lambda: os.utime(path, (1, 1)),
        "setxattr": lambda: os.setxattr(path, "user.test", b"x"),
    }
    ends = {}
    for name, way in ways.items():
        try:
            way()
            ends[name] = "done"
        except OSError as error:
            ends[name] = errno.errorcode[error.errno or 0]
    return ends
