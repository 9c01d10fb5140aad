"""The mounts of a container that the parent makes, because they take the host's rights or the host's view of files.

The source of a bind mount is a path of the host, which the container's root may not be allowed to reach. So the parent
opens it as a detached copy of the mount (open_tree(2)). It sets the attributes, the propagation and an ID mapping
(mount_setattr(2) with MOUNT_ATTR_IDMAP). The child only attaches the mount.

The service makes all of them before it clones the child. `insula-oci` makes each when the child asks for it, so that
mounts are made, and get their IDs, in the listed order.

Propagation (mount_namespaces(7)): a bind mount has the propagation of its options, else that of `rootfsPropagation`,
else it is a slave, as in runc. What the host mounts below a slave appears inside, and not the other way round. In a
user namespace shared mounts become slaves too: none propagates to the host.
"""

from __future__ import annotations

import os

from insula.container import wire
from insula.container.create import devices, namespaces
from insula.container.create.steps import INTERRUPTED, Steps, send, step
from insula.kernel import mounts, process, sealed, syscalls
from insula.kernel.mount_options import MountOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence
    from typing import Any

    from insula.container.create.devices import DeviceNode
    from insula.container.create.namespaces import Plan
    from insula.model.cpython import socket

SLAVE = syscalls.MS_SLAVE | syscalls.MS_REC
_BATCH = 32  # sources that are asked for in one message, which takes 64 descriptors


class PreparedMounts:
    """Detached mounts: of entries of `mounts` by their index, and the host's device nodes by their path.

    `later` lists what the parent has not opened yet: the child asks it over `sync` when an entry's turn has come.
    `inside` are sources in the root file system itself, by index, as paths from the root: the child opens them, because
    entries before them may have changed what is there. `links` are the contents of sources that are symbolic links to
    be made anew (`copy-symlink`), by index.
    """

    def __init__(self) -> None:
        self.mounts: dict[int, int] = {}
        self.devices: dict[str, int] = {}
        self.later: list[int | str] = []
        self.inside: dict[int, str] = {}
        self.links: dict[int, str] = {}
        self.sync: socket.socket | None = None

    def descriptors(self) -> list[int]:
        return [*self.mounts.values(), *self.devices.values()]

    def close(self) -> None:
        for fd in self.descriptors():
            os.close(fd)
        self.mounts, self.devices = {}, {}

    def take(self, index: int) -> int:
        """The mount of an entry, which the caller closes; -1 if the parent makes none for it."""
        if index in self.later:
            # those that follow one another in one message: their IDs come out in the same order
            run = [index]
            while run[-1] + 1 in self.later and len(run) < _BATCH:
                run.append(run[-1] + 1)
            self.mounts.update(zip(run, self._ask(run), strict=True))
        return self.mounts.pop(index, -1)

    def take_devices(self) -> dict[str, int]:
        """The device nodes by path, as detached mounts that the caller closes."""
        while paths := [key for key in self.later if isinstance(key, str)][:_BATCH]:
            self.devices.update(zip(paths, self._ask(paths), strict=True))
        found, self.devices = self.devices, {}
        return found

    def map_owners(self, index: int, mount: int) -> None:
        """Ask the parent to set the ID mapping of a mount, which takes the host's rights."""
        assert self.sync is not None
        wire.send(self.sync, {"event": "map", "source": index}, [mount])
        if wire.receive(self.sync) is None:
            os._exit(INTERRUPTED)

    def _ask(self, keys: Sequence[int | str]) -> list[int]:
        assert self.sync is not None
        send(self.sync, {"event": "open", "sources": keys})
        received = wire.receive(self.sync)
        if received is None or len(received[1]) != len(keys):
            os._exit(INTERRUPTED)
        self.later = [key for key in self.later if key not in keys]
        return received[1]


def changes_only(entry: dict[str, Any], options: MountOptions) -> bool:
    """Whether an entry of `mounts` changes the mount that is at its destination already, and makes none."""
    return options.remount or not (entry.get("type") or entry.get("source"))


def is_bind(entry: dict[str, Any], options: MountOptions) -> bool:
    """Whether an entry is a bind mount: by its options or its type, as the spec has it."""
    return not changes_only(entry, options) and (options.bind or entry.get("type", "bind") in ("bind", "none"))


def devices_in_root(entries: list[dict[str, Any]], wanted: list[DeviceNode]) -> list[DeviceNode]:
    """The nodes of `wanted` that are made in the root file system: those outside of /dev if a mount lies there."""
    mounted = any(destination(entry) == "/dev" for entry in entries)
    return [node for node in wanted if not (mounted and node.path.startswith("/dev/"))]


def destination(entry: dict[str, Any]) -> str:
    """The destination of an entry of `mounts`, as an absolute path. A relative one is below the root, as in runc."""
    path: str = entry["destination"]
    return os.path.normpath("/" + path.lstrip("/"))


def propagation_of_root(config: dict[str, Any]) -> int:
    """`rootfsPropagation` as MS_* bits; 0 if it is not given."""
    name = config["linux"].get("rootfsPropagation")
    return MountOptions([name]).propagation if name else 0


def open_root(path: str, config: dict[str, Any]) -> int:
    """A detached copy of the root file system at `path`, with what is mounted below it.

    It is private or a slave, so that nothing that is mounted in it appears on the host.
    """
    root = mounts.bind(path, recursive=True)
    try:
        mounts.propagate(root, SLAVE)
        if (kind := propagation_of_root(config)) & syscalls.MS_PRIVATE:
            mounts.propagate(root, kind)
    except OSError:
        os.close(root)
        raise
    return root


def open_all(config: dict[str, Any], plan: Plan, *, but: Container[int] = ()) -> PreparedMounts:
    """Open the mounts of all entries, except those with the indices `but`, and device nodes.

    OSError if a source is not there or may not be used so, and nothing stays open.
    """
    made = PreparedMounts()
    entries = config.get("mounts") or []
    try:
        for index, entry in enumerate(entries):
            if index not in but and is_made_outside(entry):
                made.mounts[index] = open_one(config, entry, plan)
        if plan.has_user():
            for node in devices_in_root(entries, devices.nodes(config["linux"].get("devices") or (), plan)):
                made.devices[node.path] = node.bind_host()
    except OSError:
        made.close()
        raise
    return made


def open_later(config: dict[str, Any], plan: Plan) -> PreparedMounts:
    """List the mounts to open when the child asks for them (`answer`), so that all are made in the listed order."""
    made = PreparedMounts()
    entries = config.get("mounts") or []
    root = os.path.realpath(config["root"]["path"])
    for index, entry in enumerate(entries):
        if not is_made_outside(entry):
            continue
        options = MountOptions(entry.get("options") or ())
        if options.copy_link and is_bind(entry, options) and os.path.islink(entry["source"]):
            made.links[index] = os.readlink(entry["source"])
            continue
        source = os.path.realpath(entry["source"]) if is_bind(entry, options) else ""
        if covers(root, source):
            made.inside[index] = os.path.relpath(source, root)
        else:
            made.later.append(index)
    if plan.has_user():
        wanted = devices.nodes(config["linux"].get("devices") or (), plan)
        made.later += [node.path for node in devices_in_root(entries, wanted)]
    return made


def answer(config: dict[str, Any], plan: Plan, keys: Sequence[int | str], sync: socket.socket) -> None:
    """In the parent: open the mounts that the child asks for, and send them. StepError names an entry that fails."""
    opened: list[int] = []
    nodes = {n.path: n for n in devices.nodes(config["linux"].get("devices") or (), plan)} if keys else {}
    try:
        for key in keys:
            if isinstance(key, str):
                step(Steps.MAKE_DEVICES, _append, opened, nodes[key].bind_host)
            else:
                entry = config["mounts"][key]
                step(Steps.MOUNT, _append, opened, open_one, config, entry, plan, about=entry["destination"])
        wire.send(sync, {"event": "opened"}, opened)
    finally:
        for fd in opened:
            os.close(fd)


def _append(opened: list[int], opener: Callable[..., int], *arguments: object) -> None:
    opened.append(opener(*arguments))


def answer_map(config: dict[str, Any], plan: Plan, index: int, mount: int, sync: socket.socket) -> None:
    """In the parent: map the owners of a mount that the child has made, of the entry `index`; `mount` is closed."""
    entry = config["mounts"][index]
    options = MountOptions(entry.get("options") or ())
    try:
        step(Steps.MOUNT, _map_owners, mount, entry, options, plan, about=entry["destination"])
    finally:
        os.close(mount)
    wire.send(sync, {"event": "mapped"})


def is_made_outside(entry: dict[str, Any]) -> bool:
    """Whether an entry of `mounts` is opened by the parent: a bind mount, or the tmpfs on /dev with its devices."""
    return _is_dev(entry) or is_bind(entry, MountOptions(entry.get("options") or ()))


def _is_dev(entry: dict[str, Any]) -> bool:
    return entry.get("type") == "tmpfs" and destination(entry) == "/dev"


def is_idmapped(entry: dict[str, Any], options: MountOptions) -> bool:
    return bool(options.idmap or entry.get("uidMappings"))


def covers(upper: str, path: str) -> bool:
    """Whether a mount on `upper` hides `path`; both are absolute and normal."""
    return path == upper or path.startswith(upper.rstrip("/") + "/")


def open_one(config: dict[str, Any], entry: dict[str, Any], plan: Plan) -> int:
    """The detached mount of one entry."""
    options = MountOptions(entry.get("options") or ())
    if _is_dev(entry):
        return devices.file_system(options, devices.nodes(config["linux"].get("devices") or (), plan), plan)
    try:
        if options.sealed:
            fd = sealed.bind(entry["source"])
        else:
            fd = mounts.bind(entry["source"], recursive=options.recursive)
        if is_idmapped(entry, options):
            try:
                _map_owners(fd, entry, options, plan)
            except OSError:
                os.close(fd)
                raise
        return finish_bind(fd, entry, options, propagation_of_root(config), plan)
    except OSError as error:
        raise OSError(error.errno, error.strerror, entry["source"]) from None


def finish_bind(fd: int, entry: dict[str, Any], options: MountOptions, of_root: int, plan: Plan) -> int:
    """Set attributes and propagation of the copy of a mount by its options; `fd` is closed if that fails."""
    try:
        mounts.change(fd, options.own)
        mounts.change(fd, options.all_below, recursive=True)
        wanted = options.propagation or of_root or SLAVE
        shared = wanted & syscalls.MS_SHARED
        if (shared and plan.has_user()) or not (shared or wanted & syscalls.MS_REC):
            mounts.propagate(fd, SLAVE)  # what lies below, of which `wanted` need not speak
        mounts.propagate(fd, wanted)
    except OSError:
        os.close(fd)
        raise
    return fd


def _map_owners(fd: int, entry: dict[str, Any], options: MountOptions, plan: Plan) -> None:
    """The mount's own mapping, or else the container's (`idmap`); `ridmap` is for all mounts below it too."""
    uids, gids = (namespaces.id_map(entry.get(name)) for name in ("uidMappings", "gidMappings"))
    userns = process.user_namespace(uids or plan.uids, gids or plan.gids)
    try:
        mounts.set_idmap(fd, userns, recursive=options.idmap == "ridmap")
    finally:
        os.close(userns)
