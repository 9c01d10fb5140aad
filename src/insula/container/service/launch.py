"""Start containers for the service: with an overlay over image layers as the root, and pipes as streams."""

from __future__ import annotations

import errno
import os

from insula.container.create.spawn import SpawnOptions, spawn
from insula.container.create.steps import StepError, Steps
from insula.kernel import cgroups, mounts, process, syscalls
from insula.kernel.rollback import Rollback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.container.create.exec_process import Filter
    from insula.container.create.spawn import SpawnedProcess
    from insula.container.service.run_directory import Launch

IDS = 65536
_NAMESPACES = [{"type": kind} for kind in ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")]


class Layers:
    """Image layers as idmapped mounts in the zygote's own mount namespace, made once for each tenant and layer.

    They are attached under short names in the current directory: the options of an overlay, of up to 500 layers, must
    fit into a page. Processes in the overlay can read them in its mountinfo, so they are random: numbers would tell
    how many others there are.
    The longest unused is dropped when there are too many; an overlay that uses it keeps its own copy.
    """

    def __init__(self, limit: int = 512) -> None:
        self._limit = limit
        self._mounted: dict[tuple[int, str], str] = {}
        self._namespaces: dict[int, int] = {}

    def lower(self, id_base: int, paths: list[str]) -> list[str]:
        """Mount the layers unless they are mounted; their names for lowerdir of overlayfs, topmost first."""
        return [self._mount(id_base, path) for path in paths]

    def _mount(self, id_base: int, path: str) -> str:
        key = (id_base, path)
        name = self._mounted.pop(key, None)
        if name is None:
            if id_base not in self._namespaces:
                self._namespaces[id_base] = process.user_namespace([(0, id_base, IDS)], [(0, id_base, IDS)])
            mount = mounts.idmapped(path, self._namespaces[id_base])
            name = _random_directory()
            try:
                syscalls.move_mount(mount, syscalls.AT_FDCWD, name)
            finally:
                os.close(mount)
        self._mounted[key] = name  # the order of a dict is the order of use
        if len(self._mounted) > self._limit:
            self._drop(next(iter(self._mounted)))
        return name

    def forget(self, path: str) -> None:
        """Drop the mounts of a layer that is about to be removed."""
        for key in [k for k in self._mounted if k[1] == path]:
            self._drop(key)

    def _drop(self, key: tuple[int, str]) -> None:
        name = self._mounted.pop(key)
        syscalls.umount2(name, syscalls.MNT_DETACH)
        os.rmdir(name)


def _random_directory() -> str:
    """The name of a new directory in the current one: five random letters and digits."""
    while True:
        name = "".join("0123456789abcdefghijklmnopqrstuv"[byte & 31] for byte in os.urandom(5))
        try:
            os.mkdir(name)
        except FileExistsError:
            continue
        return name


def start(launch: Launch, layers: Layers, program: Filter | None, inherit: list[int] | None = None) -> SpawnedProcess:
    """Make PID 1 of a new container for the zygote: its root an overlay, its streams pipes.

    Whatever the config says, it is in namespaces of its own, and its IDs are those of `id_base`. The program inherits
    the descriptors in `inherit`, as 3 and so on.
    """
    config = engine_config(launch)
    with Rollback() as undo, Rollback() as child_fds:
        root, stdio, streams = root_and_streams(launch, layers, child_fds, undo)
        share = (launch.share[0], launch.share[1]) if launch.share else None
        outside = SpawnOptions(
            root=root, stdio=stdio, program=program, owner=launch.id_base, share=share, inherit=inherit
        )
        child = spawn(config, cgroups.Cgroup(launch.cgroup), outside)
        child.streams = streams
        undo.keep()
        return child


def engine_namespaces(id_base: int) -> dict[str, Any]:
    """The part of `linux` of a config for new namespaces of all types, with IDs from `id_base` on."""
    ids = [{"containerID": 0, "hostID": id_base, "size": IDS}]
    return {"namespaces": _NAMESPACES, "uidMappings": ids, "gidMappings": ids}


def engine_config(launch: Launch) -> dict[str, Any]:
    """The config of a container with the namespaces of the service."""
    return {**launch.config, "linux": {**launch.config["linux"], **engine_namespaces(launch.id_base)}}


def root_and_streams(
    launch: Launch, layers: Layers, child_fds: Rollback, undo: Rollback
) -> tuple[int, list[int], dict[str, int]]:
    """Make the root as a detached mount, the child's streams, and our ends of them by name."""
    lower = layers.lower(launch.id_base, launch.lower)
    root = child_fds.hold(_overlay(launch, lower))
    # no layer should hold a device node; if one does, it is none
    mounts.set_attributes(root, syscalls.MOUNT_ATTR_NODEV)
    if launch.tty:
        return root, [], {}
    user = launch.config["process"].get("user") or {}
    owner = (launch.id_base + user.get("uid", 0), launch.id_base + user.get("gid", 0))
    return root, *make_pipes(child_fds, undo, launch.stdin, owner)


def _overlay(launch: Launch, lower: list[str]) -> int:
    """The overlay, mounted as the tenant's root, but with all capabilities (SECBIT_NO_SETUID_FIXUP).

    overlayfs writes with its mounter's user and capabilities, and user 0 may have the blocks that ext4 reserves for
    it. (overlayfs itself takes CAP_SYS_RESOURCE away, which would open them too.)
    """
    os.seteuid(launch.id_base)
    try:
        root = mounts.overlay(lower, launch.upper, launch.work, volatile=launch.volatile)
    finally:
        os.seteuid(0)
    if os.fstatvfs(root).f_flag & os.ST_RDONLY:  # overlayfs does so when it can't make its work directory
        os.close(root)
        raise StepError(Steps.MAKE_ROOT, OSError(errno.ENOSPC, "no space is left for it"))
    return root


def make_pipes(
    child_fds: Rollback, undo: Rollback, stdin: bool, owner: tuple[int, int]
) -> tuple[list[int], dict[str, int]]:
    """Make pipes for the standard streams: (the child's ends in order, our ends by name). -1 is /dev/null.

    They belong to the program's user, so that it may open them again as /dev/stdout.
    """
    stdio, streams = [-1], {}
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number == 0 and not stdin:
            continue
        read, write = os.pipe2(os.O_CLOEXEC)
        child, parent = (read, write) if number == 0 else (write, read)
        child_fds.hold(child)
        streams[name] = undo.hold(parent)
        os.fchown(child, *owner)
        os.set_blocking(parent, False)
        if number == 0:
            stdio[0] = child
        else:
            stdio.append(child)
    return stdio, streams
