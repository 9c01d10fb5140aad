"""What the spawner does outside of a new container: the parts that take the host's rights, and the clone.

Prepared before the child is born: its cgroup with limits, the overlay of its root, /dev with real device nodes,
bind mounts of the host's files, pipes. All of it is held by descriptors, so that a failure at any step leaves
nothing: what was opened is closed and the kernel forgets it; only the cgroup has a name, and that is removed.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import Any, NamedTuple

from insula.container import init
from insula.container.bundle import Launch
from insula.container.departure import Filter
from insula.kernel import cgroups, linux, mounts, process
from insula.model.stream import Kind

_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
    "core": "/proc/kcore",
}
_S_IFCHR = 0o020000
IDS = 65536

NAMESPACES = (
    linux.CLONE_NEWUSER
    | linux.CLONE_NEWNS
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
)
"""Every namespace but the cgroup one, which the child makes itself once it is in its cgroup."""


class Child(NamedTuple):
    """A new process: its pid and pidfd, our end of the channel to it, and our ends of its streams."""

    pid: int
    pidfd: int
    start_time: int
    sync: socket.socket
    streams: dict[str, int]  # "stdin", "stdout", "stderr"


class Layers:
    """Image layers as idmapped mounts in the spawner's own mount namespace, made once for each tenant and layer.

    They are attached under short numbers in the current directory: the options of an overlay have little room.
    The longest unused is dropped when there are too many; an overlay that uses it keeps its own copy.
    """

    def __init__(self, limit: int = 512) -> None:
        self._limit = limit
        self._mounted: dict[tuple[int, str], str] = {}
        self._namespaces: dict[int, int] = {}
        self._next = 0

    def lower(self, id_base: int, paths: list[str]) -> list[str]:
        """The names for overlayfs' lowerdir, topmost first."""
        return [self._mount(id_base, path) for path in paths]

    def _mount(self, id_base: int, path: str) -> str:
        key = (id_base, path)
        name = self._mounted.pop(key, None)
        if name is None:
            if id_base not in self._namespaces:
                self._namespaces[id_base] = process.user_namespace([(0, id_base, IDS)], [(0, id_base, IDS)])
            mount = mounts.idmapped(path, self._namespaces[id_base])
            self._next += 1
            name = str(self._next)
            os.mkdir(name)
            try:
                linux.move_mount(mount, linux.AT_FDCWD, name)
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
        linux.umount2(name, linux.MNT_DETACH)
        os.rmdir(name)


def start(launch: Launch, layers: Layers, program: Filter | None) -> Child:
    """Make PID 1 of a new container; it waits, ready, for the second message on `sync`.

    Raises OSError if anything is refused; then nothing of it is left.
    """
    config = launch.config
    user = config["process"].get("user") or {}
    with ExitStack() as undo:
        handed = ExitStack()  # what only the child needs: closed here in any case
        undo.enter_context(handed)
        group = cgroups.Cgroup(launch.cgroup)
        group.create()
        undo.callback(group.remove)
        group.limit(config["linux"].get("resources") or {})
        join = [hold(handed, fd) for fd in group.open()]
        lower = layers.lower(launch.id_base, launch.lower)
        root = hold(handed, mounts.overlay(lower, launch.upper, launch.work, volatile=launch.volatile))
        mounts.set_attributes(
            root, linux.MOUNT_ATTR_NODEV
        )  # no layer should hold a device node; if one does, it is none
        prepared = {i: hold(handed, fd) for i, fd in _prepare_mounts(config, launch.id_base).items()}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handed.callback(theirs.close)
        undo.callback(ours.close)
        stdio: list[int] = []
        streams: dict[str, int] = {}
        if not launch.tty:
            owner = (launch.id_base + user.get("uid", 0), launch.id_base + user.get("gid", 0))
            stdio, streams = make_pipes(handed, undo, launch.stdin, owner)
        tree = cgroups.hierarchy()
        controllers = None if tree.unified else group.directories()
        given = init.Inheritance(theirs, root, prepared, join, stdio, program, controllers=controllers)
        # what is counted for a user (inotify, queued signals, message queues) is counted for the owner of his
        # namespace too: were that root, then one tenant could use up what the host and all others have
        os.seteuid(launch.id_base)
        try:
            pid, pidfd = linux.clone3(NAMESPACES)
            if pid == 0:
                init.main(config, given, launch.tty)
        finally:
            os.seteuid(0)
        undo.callback(os.close, pidfd)
        started = process.start_time(pid) or 0
        process.map_ids(pid, [(0, launch.id_base, IDS)], [(0, launch.id_base, IDS)])
        if (score := config["process"].get("oomScoreAdj")) is not None:
            _write(f"/proc/{pid}/oom_score_adj", str(score))
        handed.close()
        undo.pop_all()
        return Child(pid, pidfd, started, ours, streams)


def make_pipes(
    handed: ExitStack, undo: ExitStack, stdin: bool, owner: tuple[int, int]
) -> tuple[list[int], dict[str, int]]:
    """Pipes for the standard streams: (the child's ends in order, our ends by name). -1 is /dev/null.

    They belong to the program's user, who may open them again as /dev/stdout.
    """
    stdio, streams = [-1], {}
    for name, kind in (("stdin", Kind.STDIN), ("stdout", Kind.STDOUT), ("stderr", Kind.STDERR)):
        if kind is Kind.STDIN and not stdin:
            continue
        read, write = os.pipe2(os.O_CLOEXEC)
        child, parent = (read, write) if kind is Kind.STDIN else (write, read)
        os.fchown(child, *owner)
        os.set_blocking(parent, False)
        if kind is Kind.STDIN:
            stdio[0] = hold(handed, child)
        else:
            stdio.append(hold(handed, child))
        streams[name] = hold(undo, parent)
    return stdio, streams


def _prepare_mounts(config: dict[str, Any], id_base: int) -> dict[int, int]:
    """The entries of `mounts` that take the host's rights: /dev, and what is bound from the host."""
    made: dict[int, int] = {}
    try:
        for index, entry in enumerate(config.get("mounts", ())):
            options = mounts.parse_options(entry.get("options", ()))
            if entry["destination"] == "/dev" and entry.get("type") == "tmpfs":
                made[index] = make_devices(options, id_base, config["linux"].get("devices") or ())
            elif entry.get("type", "bind") in ("bind", "none"):
                made[index] = mounts.bind(entry["source"], recursive=options.recursive, attributes=options.attributes)
    except OSError:
        for fd in made.values():
            os.close(fd)
        raise
    return made


def make_devices(options: mounts.Options, id_base: int, more: Any = ()) -> int:
    """A detached /dev: a tmpfs with the devices that every container may use, and nothing else of the host's."""
    data = [*options.data, f"uid={id_base}", f"gid={id_base}"]
    dev = mounts.filesystem("tmpfs", data, options.attributes, "tmpfs")
    umask = os.umask(0)
    try:
        for name, (major, minor) in _DEVICES.items():
            os.mknod(name, _S_IFCHR | 0o666, os.makedev(major, minor), dir_fd=dev)
            os.chown(name, id_base, id_base, dir_fd=dev)
        for name, target in _DEVICE_LINKS.items():
            os.symlink(target, name, dir_fd=dev)
        for name in ("pts", "shm", "mqueue"):
            os.mkdir(name, 0o755, dir_fd=dev)
            os.chown(name, id_base, id_base, dir_fd=dev)
    except OSError:
        os.close(dev)
        raise
    finally:
        os.umask(umask)
    return dev


def hold(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)
