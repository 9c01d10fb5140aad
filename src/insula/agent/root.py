"""The root file system of a machine: an image that it can only read, and a disk of its own above.

The image is one erofs for each image, the same for all machines and tenants: the host's page cache holds it once. The
disk is ext4. An overlay joins them, as it does for containers. The two virtio disks are told apart by their serial
numbers, which the host sets.
"""

from __future__ import annotations

import os

from insula.kernel import mounts, syscalls
from insula.machine import protocol

IMAGE, DISK = "image", "disk"
"""Serial numbers of the disks."""
_BLOCKS = "/sys/block"


def mount(*, read_only: bool = False) -> int:
    """Mount both disks, and return the root as a detached mount."""
    for name, kind, flags in ((IMAGE, "erofs", syscalls.MS_RDONLY), (DISK, "ext4", syscalls.MS_NOATIME)):
        os.makedirs(f"/{name}", exist_ok=True)
        syscalls.mount(device(name), f"/{name}", kind, flags | syscalls.MS_NODEV)
    for name in ("upper", "work"):
        os.makedirs(f"/{DISK}/{name}", exist_ok=True)
    attributes = syscalls.MOUNT_ATTR_RDONLY if read_only else 0
    root = mounts.overlay([f"/{IMAGE}"], f"/{DISK}/upper", f"/{DISK}/work")
    mounts.set_attributes(root, syscalls.MOUNT_ATTR_NODEV | attributes)
    return root


def write_etc(files: dict[str, str]) -> None:
    """Write the files that the program's config mounts over those of the image, as /run/etc/NAME."""
    os.makedirs(protocol.ETC, exist_ok=True)
    for name, text in files.items():
        with open(f"{protocol.ETC}/{os.path.basename(name)}", "w") as file:
            file.write(text)


def device(serial: str) -> str:
    """The device of the disk with this serial number. FileNotFoundError if there is none."""
    for name in os.listdir(_BLOCKS):
        try:
            with open(f"{_BLOCKS}/{name}/serial") as file:
                if file.read().strip() == serial:
                    return f"/dev/{name}"
        except FileNotFoundError:
            continue
    raise FileNotFoundError(f"there is no disk {serial}")
