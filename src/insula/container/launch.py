"""What happens outside of a new container: the parts that take the host's rights, and the clone.

Prepared before the child is born: its cgroup with limits, its root, /dev with real device nodes, bind mounts of the
host's files, streams. All of it is held by descriptors, so that a failure at any step leaves nothing: what was opened
is closed and the kernel forgets it; only the cgroup has a name, and that is removed.

`spawn` is the flow that both faces of the room share. The engine's spawner calls it with an overlay and pipes
(`start`), `insula-oci` with a directory of the host and its own streams. Everything else comes from the config (OCI
runtime-spec).
"""

from __future__ import annotations

import errno
import os

from insula.container import init, namespaces, sources, wire
from insula.container.cgroup_mount import Groups, own_directories
from insula.container.steps import StepError
from insula.kernel import cgroups, linux, mounts, process, scheduling
from insula.kernel.cgroups import delegation
from insula.kernel.undo import Undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Any

    from insula.container.bundle import Launch
    from insula.container.departure import Filter
    from insula.kernel.cgroups import Cgroup

IDS = 65536
_NAMESPACES = [{"type": kind} for kind in ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")]


class Child:
    """A new process: its pid and pidfd, our end of the channel to it, its namespaces, and our ends of its streams."""

    __slots__ = ("pid", "pidfd", "plan", "start_time", "streams", "sync")

    def __init__(self, pid: int, pidfd: int, sync: _socket.socket, plan: namespaces.Plan | None = None) -> None:
        self.plan = plan
        self.pid = pid
        self.pidfd = pidfd
        self.start_time = process.start_time(pid) or 0
        self.sync = sync
        self.streams: dict[str, int] = {}  # "stdin", "stdout", "stderr"


class Outside:
    """What a face of the room brings along for a container, besides its config.

    `root` is a detached mount, `stdio` the child's streams (-1 is /dev/null; none with a terminal). `owner` is the user
    of the host for whom the user namespace is made. `keep` descriptors from 3 on are passed to the program. `share` is
    the first process, as PID and start time, of a container whose user and PID namespaces are joined.

    `in_order`: the mounts are made strictly in the listed order, as /proc/self/mountinfo shows them, and the root is
    attached at its path. Then the caller answers the child's requests (`sources.answer`) until it is ready. Without it
    what is bound is opened at once, and /proc, /sys and /dev come first, as for a container that is made ahead.
    """

    def __init__(
        self,
        *,
        root: int,
        stdio: list[int],
        program: Filter | None = None,
        owner: int = 0,
        keep: int = 0,
        pivot: bool = True,
        keyring: bool = True,
        share: tuple[int, int] | None = None,
        in_order: bool = False,
        waits_at: _socket.socket | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.root, self.stdio, self.program, self.owner = root, stdio, program, owner
        self.keep, self.pivot, self.keyring, self.share = keep, pivot, keyring, share
        self.in_order, self.waits_at, self.state = in_order, waits_at, state


def spawn(config: dict[str, Any], group: Cgroup | None, outside: Outside) -> Child:
    """Make a container's first process; it goes on when it is told "mapped" over `sync` (see `insula.container.init`).

    `group` is where it shall be. OSError or StepError if anything is refused; then nothing of it is left.
    """
    own = config["linux"]
    _load(config)
    with Undo() as undo, Undo() as handed:  # what only the child needs is closed here in any case
        plan = namespaces.plan(own, handed, outside.share)
        into: int | None = None
        join: list[int] = []
        if group is not None:
            group.create()
            undo.callback(group.remove)
            group.limit(own.get("resources") or {})
            if delegation.asked_for(config, plan.cgroup):
                delegation.delegate(group, plan.outside((config["process"].get("user") or {}).get("uid", 0), 0)[0])
            into, join = enter_group(group, handed)
            if outside.in_order and (beside := group.open_beside()) is not None:
                into = handed.hold(beside)
        opened = sources.open_later(config, plan) if outside.in_order else sources.open_all(config, plan)
        handed.callback(opened.close)
        ours, theirs = wire.pair()
        undo.callback(ours.close)
        handed.callback(theirs.close)
        given = init.Inheritance(
            sync=theirs,
            root=outside.root,
            sources=opened,
            join=join,
            groups=Groups(group.directories() if group else own_directories(), plan.cgroup),
            stdio=outside.stdio,
            program=outside.program,
            tty=bool(config["process"].get("terminal")),
            keep=outside.keep,
            pivot=outside.pivot,
            keyring=outside.keyring,
            in_order=outside.in_order,
            waits_at=outside.waits_at,
            state=outside.state,
        )
        bundle = handed.hold(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        if outside.in_order:  # a new mount namespace translates it, and no right is needed to be there
            os.chdir(config["root"]["path"])
        pid, pidfd = clone(plan, outside.owner, into)
        if pid == 0:
            init.main(config, given, plan)
        os.fchdir(bundle)
        undo.hold(pidfd)
        if plan.makes(linux.CLONE_NEWUSER):
            process.map_ids(pid, plan.uids, plan.gids)
            scheduling.give(config["process"], pid)  # a real-time policy takes CAP_SYS_NICE of the host
        if (score := config["process"].get("oomScoreAdj")) is not None:
            process.set_oom_score(pid, score)
        undo.keep()
        return Child(pid, pidfd, ours, plan)


def _load(config: dict[str, Any]) -> None:
    """Import what few containers need and their child can't import any more."""
    if config.get("hooks"):
        from insula.container import hooks  # noqa: F401
    if (config["linux"].get("seccomp") or {}).get("listenerPath"):
        from insula.container import notify  # noqa: F401
    if any("tmpcopyup" in (entry.get("options") or ()) for entry in config.get("mounts") or ()):
        from insula.container import copy_up  # noqa: F401


def enter_group(group: Cgroup, handed: Undo) -> tuple[int | None, list[int]]:
    """How a child gets into its group: it is born in it (version 2), or joins by these descriptors (version 1)."""
    if group.tree.unified:
        return handed.hold(os.open(group.directories()[""], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)), []
    return None, [handed.hold(fd) for fd in group.open()]


def clone(plan: namespaces.Plan, owner: int, group: int | None) -> tuple[int, int]:
    """`namespaces.clone` by the user `owner` of the host."""
    # what is counted for a user (inotify, queued signals, message queues) is counted for the owner of his
    # namespace too: were that root, then one tenant could use up what the host and all others have
    if not owner:
        return namespaces.clone(plan, group)
    os.seteuid(owner)
    pid = -1
    try:
        pid, pidfd = namespaces.clone(plan, group)
    finally:
        if pid:  # in the child, no ID is mapped yet
            os.seteuid(0)
    return pid, pidfd


# -- the engine's containers -------------------------------------------------------------------------------------------


class Layers:
    """Image layers as idmapped mounts in the spawner's own mount namespace, made once for each tenant and layer.

    They are attached under short names in the current directory: the options of an overlay, of up to 500 layers, must
    fit into a page. Whoever is in the overlay can read them in its mountinfo, so they are random: numbers would tell
    how many others there are.
    The longest unused is dropped when there are too many; an overlay that uses it keeps its own copy.
    """

    def __init__(self, limit: int = 512) -> None:
        self._limit = limit
        self._mounted: dict[tuple[int, str], str] = {}
        self._namespaces: dict[int, int] = {}

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
            name = _random_directory()
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


def _random_directory() -> str:
    """The name of a new directory in the current one: five random letters and digits."""
    while True:
        name = "".join("0123456789abcdefghijklmnopqrstuv"[byte & 31] for byte in os.urandom(5))
        try:
            os.mkdir(name)
        except FileExistsError:
            continue
        return name


def start(launch: Launch, layers: Layers, program: Filter | None) -> Child:
    """Make PID 1 of a new container for the spawner: its root an overlay, its streams pipes.

    Whatever the config says, it is in namespaces of its own, and its IDs are those of `id_base`.
    """
    config = engine_config(launch)
    with Undo() as undo, Undo() as handed:
        root, stdio, streams = root_and_streams(launch, layers, handed, undo)
        share = (launch.share[0], launch.share[1]) if launch.share else None
        outside = Outside(root=root, stdio=stdio, program=program, owner=launch.id_base, share=share)
        child = spawn(config, cgroups.Cgroup(launch.cgroup), outside)
        child.streams = streams
        undo.keep()
        return child


def engine_namespaces(id_base: int) -> dict[str, Any]:
    """The part of `linux` that says: all namespaces of its own, with IDs from `id_base` on."""
    ids = [{"containerID": 0, "hostID": id_base, "size": IDS}]
    return {"namespaces": _NAMESPACES, "uidMappings": ids, "gidMappings": ids}


def engine_config(launch: Launch) -> dict[str, Any]:
    """The config of a container of the engine's, as it is carried out."""
    return {**launch.config, "linux": {**launch.config["linux"], **engine_namespaces(launch.id_base)}}


def root_and_streams(launch: Launch, layers: Layers, handed: Undo, undo: Undo) -> tuple[int, list[int], dict[str, int]]:
    """A detached root, the child's streams, and our ends of them by name."""
    lower = layers.lower(launch.id_base, launch.lower)
    root = handed.hold(_overlay(launch, lower))
    # no layer should hold a device node; if one does, it is none
    mounts.set_attributes(root, linux.MOUNT_ATTR_NODEV)
    if launch.tty:
        return root, [], {}
    user = launch.config["process"].get("user") or {}
    owner = (launch.id_base + user.get("uid", 0), launch.id_base + user.get("gid", 0))
    return root, *make_pipes(handed, undo, launch.stdin, owner)


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
        raise StepError("make the root file system", OSError(errno.ENOSPC, "no space is left for it"))
    return root


def make_pipes(handed: Undo, undo: Undo, stdin: bool, owner: tuple[int, int]) -> tuple[list[int], dict[str, int]]:
    """Pipes for the standard streams: (the child's ends in order, our ends by name). -1 is /dev/null.

    They belong to the program's user, who may open them again as /dev/stdout.
    """
    stdio, streams = [-1], {}
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number == 0 and not stdin:
            continue
        read, write = os.pipe2(os.O_CLOEXEC)
        child, parent = (read, write) if number == 0 else (write, read)
        handed.hold(child)
        streams[name] = undo.hold(parent)
        os.fchown(child, *owner)
        os.set_blocking(parent, False)
        if number == 0:
            stdio[0] = child
        else:
            stdio.append(child)
    return stdio, streams
