"""Further disks of a machine, which come and go: each is found by its serial number, and mounted where programs see it.

A disk is mounted in the agent's own root first, as /disks/NAME. The config of the first program binds it from there.
Programs that run already are in other mount namespaces, in which a process of the agent's mounts it.

One that is not to be mounted is a device node in the /dev of the programs, which is made in the same two ways.
"""

from __future__ import annotations

import contextlib
import os
import stat

from insula.kernel import mounts, syscalls
from insula.machine import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_BLOCKS = "/sys/block"
_ENODEV = 19
_BY_ID = "/dev/disk/by-id/virtio-"
"""The paths of disks begin with it, as those that udev makes."""
_MODE = 0o660


def find(name: str) -> str:
    """The device of a disk. ENODEV if it is not there yet."""
    for device in os.listdir(_BLOCKS):
        try:
            with open(f"{_BLOCKS}/{device}/serial") as file:
                found = file.read().strip()
        except FileNotFoundError:
            continue
        if found == name:
            return f"/dev/{device}"
    raise OSError(_ENODEV, f"there is no disk {name}")


def mount(name: str) -> None:
    """Mount a disk as /disks/NAME, if it is not. OSError."""
    device, place = find(name), f"{protocol.DISKS}/{name}"
    os.makedirs(place, exist_ok=True)
    if not os.path.ismount(place):
        syscalls.mount(device, place, "ext4", syscalls.MS_NOATIME | syscalls.MS_NODEV | syscalls.MS_NOSUID, "discard")


def unmount(name: str) -> None:
    """Undo that. EBUSY if it is in use; nothing happens if it is not mounted."""
    place = f"{protocol.DISKS}/{name}"
    if os.path.ismount(place):
        syscalls.umount2(place)


def show(name: str, path: str, program: int) -> None:
    """Mount /disks/NAME at a path that the program with this PID sees. OSError."""
    found = mounts.bind(f"{protocol.DISKS}/{name}")

    def work() -> None:
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        target = mounts.make_target(root, path, directory=True)
        if not os.path.ismount(f"/proc/self/fd/{target}/."):
            mounts.attach(found, target)

    try:
        _as(program, work)
    finally:
        os.close(found)


def hide(path: str, program: int) -> None:
    """Undo that. EBUSY if a program uses it; nothing happens if nothing is mounted there."""

    def work() -> None:
        if os.path.ismount(path):
            syscalls.umount2(path, syscalls.UMOUNT_NOFOLLOW)

    _as(program, work)


def node(name: str) -> dict[str, Any]:
    """The device node of a disk, as an entry of `linux.devices` (OCI runtime-spec). OSError."""
    found = os.stat(find(name)).st_rdev
    numbers = {"major": os.major(found), "minor": os.minor(found)}
    return {"path": _BY_ID + name, "type": "b", **numbers, "fileMode": _MODE, "uid": 0, "gid": 0}


def make_node(name: str, program: int) -> None:
    """Make the device node of a disk where the program with this PID sees it, in place of an older one. OSError."""
    device = os.stat(find(name)).st_rdev

    def work() -> None:
        os.makedirs(os.path.dirname(_BY_ID), 0o755, exist_ok=True)
        _remove(_BY_ID + name)
        os.mknod(_BY_ID + name, stat.S_IFBLK | _MODE, device)

    _as(program, work)


def remove_node(name: str, program: int) -> None:
    """Undo that. OSError."""
    _as(program, lambda: _remove(_BY_ID + name))


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _as(program: int, work: Callable[[], object]) -> None:
    """Do something in a process that sees the mounts of a program. OSError."""
    pidfd = os.pidfd_open(program)
    try:
        pid = os.fork()
        if pid == 0:
            _do(pidfd, work)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(pidfd)
    if failed := os.waitstatus_to_exitcode(status):
        number = failed if failed > 0 else 5
        raise OSError(number, os.strerror(number))


def _do(pidfd: int, work: Callable[[], object]) -> NoReturn:
    number = 5
    try:
        syscalls.setns(pidfd, syscalls.CLONE_NEWNS)
        work()
        number = 0
    except OSError as error:
        number = error.errno or number
    finally:
        os._exit(number)
