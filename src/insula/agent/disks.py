"""Further disks of a machine, which come and go: each is found by its serial number, and mounted where programs see it.

A disk is mounted in the agent's own root first, as /disks/NAME. The config of the first program binds it from there.
Programs that run already are in other mount namespaces, in which a process of the agent's mounts it.
"""

from __future__ import annotations

import os

from insula.kernel import mounts, syscalls
from insula.machine import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

_BLOCKS = "/sys/block"
_ENODEV = 19


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
