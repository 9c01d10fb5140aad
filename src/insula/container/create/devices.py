"""/dev of a container: the default device nodes, and those of its config.

mknod(2) of a device takes CAP_MKNOD of the host, which a user namespace never gives, and nodes on a file system that a
user namespace has mounted can't be opened. So the parent makes the nodes, in a detached tmpfs that it passes to the
child: its superblock belongs to the host, its files to the container's root.

That works where the config mounts a tmpfs on /dev, as nearly all do. Else the nodes go straight into the root file
system: made by the child if it is the host's root, else bound from the host's own nodes of the same number.

The device rules of the control group decide which devices can be opened: a node alone gives no access.
"""

from __future__ import annotations

import errno
import os
import stat

from insula.kernel import mounts, syscalls
from insula.kernel.mount_options import MountOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from insula.container.create.namespaces import Plan

DEFAULT = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
    "core": "/proc/kcore",
}
_TYPES = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


class DeviceNode:
    """A device node to make: path, type and mode as for mknod(2), device number, and owner on the host."""

    __slots__ = ("device", "gid", "mode", "path", "uid")

    def __init__(self, path: str, mode: int, device: int, uid: int, gid: int) -> None:
        self.path, self.mode, self.device, self.uid, self.gid = path, mode, device, uid, gid

    def make(self, root: int, path: str) -> None:
        """Make it at `path` below `root`, with the directories on the way; if it is there already it stays as it is.

        Others may see that directory and put another file there, so the file is checked before its owner is changed.
        """
        parent, _, name = path.rpartition("/")
        at = mounts.make_target(root, parent, directory=True)
        try:
            made = self._is_new(at, name)
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        finally:
            os.close(at)
        try:
            found = os.fstat(fd)
            if stat.S_IFMT(found.st_mode) != stat.S_IFMT(self.mode) or found.st_rdev != self.device:
                raise OSError(errno.EEXIST, "another file is in the place of the device", self.path)
            if made:
                syscalls.chown(fd, self.uid, self.gid)
        finally:
            os.close(fd)

    def _is_new(self, at: int, name: str) -> bool:
        try:
            os.mknod(name, self.mode, self.device, dir_fd=at)
        except FileExistsError:
            return False
        return True

    def make_unseen(self, root: int, path: str) -> None:
        """Make it in a new file system that no other process can reach yet, which takes fewer system calls."""
        parent, _, name = path.rpartition("/")
        at = mounts.make_target(root, parent, directory=True)
        try:
            os.mknod(name, self.mode, self.device, dir_fd=at)
            os.chown(name, self.uid, self.gid, dir_fd=at, follow_symlinks=False)
        finally:
            os.close(at)

    def bind_host(self) -> int:
        """A detached copy of the host's node at the same path, which must be the same device."""
        fd = mounts.bind(self.path)
        mounts.propagate(fd, syscalls.MS_PRIVATE)  # what the container mounts on it must not appear on the host's
        found = os.fstat(fd)
        if stat.S_IFMT(found.st_mode) != stat.S_IFMT(self.mode) or found.st_rdev != self.device:
            os.close(fd)
            raise OSError(errno.ENODEV, "the host has no such device, and none may be made", self.path)
        return fd


def nodes(config: Iterable[dict[str, Any]], plan: Plan) -> list[DeviceNode]:
    """The default devices and those of `linux.devices`, which take the place of a default one of the same path."""
    uid, gid = plan.outside(0, 0)
    found = {
        f"/dev/{name}": DeviceNode(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(*numbers), uid, gid)
        for name, numbers in DEFAULT.items()
    }
    for entry in config:
        kind = _TYPES[entry["type"]]
        number = os.makedev(entry.get("major", 0), entry.get("minor", 0)) if kind != stat.S_IFIFO else 0
        owner = plan.outside(entry.get("uid", 0), entry.get("gid", 0))
        path = os.path.normpath("/" + entry["path"].lstrip("/"))
        if path == "/dev/ptmx":  # always the link to the container's own; engines list the host's when privileged
            continue
        mode = entry.get("fileMode", 0o666) & 0o7777
        found[path] = DeviceNode(path, kind | mode, number, *owner)
    return list(found.values())


def file_system(options: MountOptions, wanted: list[DeviceNode], plan: Plan) -> int:
    """A detached tmpfs for /dev with the nodes below /dev, links, and the directories that are mounted on."""
    uid, gid = plan.outside(0, 0)
    attributes = options.attributes & ~syscalls.MOUNT_ATTR_RDONLY  # that comes when all is in it
    dev = mounts.filesystem("tmpfs", [*options.data, f"uid={uid}", f"gid={gid}"], attributes, "tmpfs")
    umask = os.umask(0)
    try:
        for node in wanted:
            if node.path.startswith("/dev/"):
                node.make_unseen(dev, node.path.removeprefix("/dev/"))
        make_links(dev)
        for name in ("pts", "shm", "mqueue"):
            os.mkdir(name, 0o755, dir_fd=dev)
            os.chown(name, uid, gid, dir_fd=dev)
    except OSError:
        os.close(dev)
        raise
    finally:
        os.umask(umask)
    return dev


def make_links(dev: int) -> None:
    """The symbolic links of /dev (runtime-linux.md); a file that is there stays."""
    for name, target in LINKS.items():
        try:
            os.symlink(target, name, dir_fd=dev)
        except FileExistsError:
            continue


def link_in_root(root: int) -> None:
    """The links in the /dev of the root file system, which must not be a link itself."""
    dev = mounts.make_target(root, "dev", directory=True, links=False)
    try:
        make_links(dev)
    finally:
        os.close(dev)


def populate(root: int, wanted: list[DeviceNode], bound: dict[str, int]) -> None:
    """Make the nodes in the root file system; where that is not allowed, `bound` has mounts of the host's by path."""
    umask = os.umask(0)
    try:
        for node in wanted:
            if (copy := bound.get(node.path)) is None:
                node.make(root, node.path)
                continue
            target = mounts.make_target(root, node.path, directory=False)
            try:
                syscalls.move_mount(
                    copy, target, "", syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
                )
            finally:
                os.close(target)
                os.close(copy)
    finally:
        os.umask(umask)
