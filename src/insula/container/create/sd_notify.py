"""The socket of sd_notify(3) in a container, made by its first process before the image's program runs.

It is in a tmpfs of the container's own that has no space for other files, so no file of the host is visible in the
container. The descriptor goes to the command that starts the container (`insula.oci.notifications`); no process opens
the socket by a name that the container could have replaced.
"""

from __future__ import annotations

import os

from insula.kernel import mounts, syscalls
from insula.model.cpython import socket

NAME = "notify"
_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC


def make(root: int, directory: str) -> socket.socket:
    """Mount the tmpfs on `directory` of the root file system behind `root`; returns the socket, which is bound.

    Any user of the container may send to it. The working directory changes.
    """
    mount = mounts.filesystem("tmpfs", ("size=4096", "nr_inodes=2", "mode=755"), _ATTRIBUTES, "tmpfs")
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        os.fchdir(mount)  # a relative name: sun_path has room for 108 bytes
        sock.bind(NAME)
        os.chmod(NAME, 0o777)
        mounts.set_attributes(mount, syscalls.MOUNT_ATTR_RDONLY)
        target = mounts.make_target(root, directory, directory=True)
        try:
            mounts.attach(mount, target)
        finally:
            os.close(target)
    finally:
        os.close(mount)
    return sock
