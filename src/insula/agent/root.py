"""The root file system of a machine: an image that it can only read, and a disk of its own above.

The image is one erofs for each image, the same for all machines and tenants: the host's page cache holds it once. The
disk is ext4. An overlay joins them, as it does for containers. The two virtio disks are told apart by their serial
numbers, which the host sets, and those of Xen by their names.
"""

from __future__ import annotations

import contextlib
import os
import stat

from insula.agent import early
from insula.kernel import ext4, mounts, syscalls
from insula.machine import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

IMAGE, DISK = "image", "disk"
"""Serial numbers of the disks."""
_OF_XEN = {IMAGE: "/dev/xvda", DISK: "/dev/xvdb"}
_OPTIONS = ("discard", "noinit_itable", "no_prefetch_block_bitmaps")
"""What is deleted is given back to the host. A new disk is a file of holes, which are zeros: else a thread of the
kernel would write zeros over them, and read what is free."""
_BLOCKS = "/sys/block"
_devices: dict[str, str] = {}
"""The disks' devices by their serial numbers, as the machine was booted with them: a copy need not look for them."""


def mount(machine: str, *, grows: bool = False) -> int:
    """Mount both disks, and return the root as a detached mount. `machine` is the machine's ID (machine-id(5)). The
    file system of a disk that `grows` was smaller at the last start."""
    _attach("erofs", ("ro",), syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NODEV, IMAGE)
    _attach("ext4", _OPTIONS, syscalls.MOUNT_ATTR_NOATIME | syscalls.MOUNT_ATTR_NODEV, DISK)
    if grows:
        with contextlib.suppress(OSError):  # then it is as large as before
            grow()
    if not os.access(f"/{DISK}/work", os.F_OK):  # which disks have from the beginning, but those of older versions
        for name in ("upper", "work"):
            os.makedirs(f"/{DISK}/{name}", 0o755, exist_ok=True)
    _write_machine_id_above(machine)
    root = mounts.overlay([f"/{IMAGE}"], f"/{DISK}/upper", f"/{DISK}/work")
    _write_machine_id(root, machine)
    mounts.set_attributes(root, syscalls.MOUNT_ATTR_NODEV)
    return root


def _attach(fstype: str, options: tuple[str, ...], attributes: int, serial: str) -> None:
    """Mount a disk in its directory, by the system calls that make the overlay too: they are translated already."""
    made = mounts.filesystem(fstype, options, attributes, device(serial))
    try:
        syscalls.move_mount(made, syscalls.AT_FDCWD, f"/{serial}")
    finally:
        os.close(made)


def _write_machine_id_above(machine: str) -> None:
    """Write the machine's ID into the upper directory of a new disk, before the overlay is mounted: overlayfs would
    first copy /etc into it, by many steps. Not if /etc of the image is no directory, or has attributes of its own."""
    etc = f"/{DISK}/upper/etc"
    with contextlib.suppress(OSError):
        found = os.lstat(f"/{IMAGE}/etc")
        if (
            not stat.S_ISDIR(found.st_mode)
            or os.access(f"/{DISK}/machine-id", os.F_OK)
            or os.listxattr(f"/{IMAGE}/etc")
        ):
            return
        os.mkdir(etc, 0o755)  # a disk that has one is not new
        if (found.st_uid, found.st_gid, found.st_mode) != (0, 0, stat.S_IFDIR | 0o755):
            os.chown(etc, found.st_uid, found.st_gid)
            os.chmod(etc, stat.S_IMODE(found.st_mode))
        _write(f"{etc}/machine-id", f"{machine}\n", 0o444)
        _write(f"/{DISK}/machine-id", machine)


def grow() -> None:
    """Have the file system of the disk be as large as the disk, which has grown. OSError."""
    ext4.grow(device(DISK), f"/{DISK}")


def missing() -> int:
    """How many bytes it is smaller."""
    return ext4.missing(device(DISK))


def _write_machine_id(root: int, machine: str) -> None:
    """Write the machine's ID before its first start, in place of one that is in the image, which all machines of that
    would share, or of the ID of the machine that this one is a copy of. An image without /etc is left as it is."""
    if _read(f"/{DISK}/machine-id") in ("", machine):
        return
    with contextlib.suppress(OSError):
        etc = mounts.open_beneath(root, "etc", flags=os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink("machine-id", dir_fd=etc)  # it may be a link
            made = os.open("machine-id", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=etc)
            os.write(made, f"{machine}\n".encode())
            os.close(made)
        finally:
            os.close(etc)
    _write(f"/{DISK}/machine-id", machine)


def renew_machine_id(machine: str) -> None:
    """Write another ID while programs have the root: in place, in the upper directory, where it was written before the
    first start. Overlayfs reads a file that was written there from there. One that the user has removed stays so."""
    with contextlib.suppress(OSError):
        upper = os.open(f"/{DISK}/upper", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = mounts.open_beneath(upper, "etc/machine-id", links=False, flags=os.O_WRONLY | os.O_CLOEXEC)
        finally:
            os.close(upper)
        with open(found, "wb", buffering=0) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.write(f"{machine}\n".encode())
                file.truncate()
    _write(f"/{DISK}/machine-id", machine)


def make_etc(config: dict[str, Any]) -> None:
    """Make the files that a program's config mounts, before it is known what is in them."""
    sources = [str(each.get("source")) for each in config["mounts"]]
    write_etc({each: "" for each in sources if os.path.dirname(each) == protocol.ETC})


def write_etc(files: dict[str, str]) -> None:
    """Write the files that the program's config mounts over those of the image, as /run/etc/NAME."""
    for name, text in files.items():
        _write(f"{protocol.ETC}/{os.path.basename(name)}", text)


def _read(path: str) -> str | None:
    """What is in a small file; None if there is none."""
    if not os.access(path, os.F_OK):
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).decode()
    finally:
        os.close(fd)


def _write(path: str, text: str, mode: int = 0o644) -> None:
    """Write a file, with as few steps as there can be: each copy of a machine does this when it starts."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def prepare() -> None:
    """Do what is the same for all machines: find the disks, and make the directories that they are mounted on."""
    for name in os.listdir(_BLOCKS):
        with contextlib.suppress(FileNotFoundError), open(f"{_BLOCKS}/{name}/serial") as file:
            _devices[file.read().strip()] = f"/dev/{name}"
    if early.is_guest_of_xen():
        _devices.update(_OF_XEN)
    for name in (IMAGE, DISK):
        os.makedirs(f"/{name}", exist_ok=True)
    os.makedirs(protocol.ETC, exist_ok=True)


def device(serial: str) -> str:
    """The device of the disk with this serial number. FileNotFoundError if there is none."""
    try:
        return _devices[serial]
    except KeyError:
        raise FileNotFoundError(f"there is no disk {serial}") from None
