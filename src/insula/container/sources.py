"""What the parent opens for a container's mounts, because it takes the host's rights or the host's view of files.

A bind mount's source is a path of the host, which the container's root need not be allowed to reach. So it is opened
outside, as a detached copy of the mount (open_tree(2)), finished in all but its place: attributes, an ID mapping
(mount_setattr(2) with MOUNT_ATTR_IDMAP), and propagation. The child only attaches it.

Propagation (mount_namespaces(7)): unless its options say otherwise, a bind mount gets that of `rootfsPropagation`,
as if it had been made inside; without one it is a slave, as in runc: what the host mounts below appears inside, not the
other way round. A user namespace never gets a mount that reports back to the host: its shared ones are slaves too.
"""

from __future__ import annotations

import os

from insula.container import devices, namespaces
from insula.kernel import linux, mounts, process
from insula.kernel.mount_options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container
    from typing import Any

    from insula.container.devices import Node
    from insula.container.namespaces import Plan

SLAVE = linux.MS_SLAVE | linux.MS_REC
_SHARED = linux.MS_SHARED | linux.MS_REC


class Sources:
    """Detached mounts: of entries of `mounts` by their index, and the host's device nodes by their path."""

    def __init__(self) -> None:
        self.mounts: dict[int, int] = {}
        self.devices: dict[str, int] = {}

    def descriptors(self) -> list[int]:
        return [*self.mounts.values(), *self.devices.values()]

    def close(self) -> None:
        for fd in self.descriptors():
            os.close(fd)
        self.mounts, self.devices = {}, {}


def changes_only(entry: dict[str, Any], options: Options) -> bool:
    """Whether an entry of `mounts` changes the mount that is at its destination already, and makes none."""
    return options.remount or not (entry.get("type") or entry.get("source"))


def is_bind(entry: dict[str, Any], options: Options) -> bool:
    """Whether an entry is a bind mount: by its options or its type, as the spec has it."""
    return not changes_only(entry, options) and (options.bind or entry.get("type", "bind") in ("bind", "none"))


def devices_in_root(entries: list[dict[str, Any]], wanted: list[Node]) -> list[Node]:
    """Those of `wanted` that no mount brings along: a tmpfs on /dev has them, and a bound /dev stays as it is."""
    mounted = any(destination(entry) == "/dev" for entry in entries)
    return [node for node in wanted if not (mounted and node.path.startswith("/dev/"))]


def destination(entry: dict[str, Any]) -> str:
    """Where an entry of `mounts` is to be, as an absolute path; relative ones are meant from the root, as in runc."""
    path: str = entry["destination"]
    return os.path.normpath("/" + path.lstrip("/"))


def propagation_of_root(config: dict[str, Any]) -> int:
    """`rootfsPropagation` as MS_* bits; 0 if it is not given."""
    name = config["linux"].get("rootfsPropagation")
    return Options([name]).propagation if name else 0


def open_root(path: str, config: dict[str, Any]) -> int:
    """A detached copy of the root file system at `path`, with what is mounted below it.

    While the container is made it is private or a slave: what is mounted in it must not appear on the host.
    """
    root = mounts.bind(path, recursive=True)
    try:
        kind = propagation_of_root(config)
        mounts.propagate(root, kind if kind & linux.MS_PRIVATE else SLAVE)
    except OSError:
        os.close(root)
        raise
    return root


def open_all(config: dict[str, Any], plan: Plan, *, but: Container[int] = ()) -> Sources:
    """Open everything, except for the mounts with the indices `but`.

    OSError if a source is not there or may not be used so, and nothing stays open.
    """
    made = Sources()
    entries = config.get("mounts") or []
    try:
        wanted = devices.nodes(config["linux"].get("devices") or (), plan)
        for index, entry in enumerate(entries):
            if index in but:
                continue
            options = Options(entry.get("options") or ())
            if entry.get("type") == "tmpfs" and destination(entry) == "/dev":
                made.mounts[index] = devices.file_system(options, wanted, plan)
            elif is_bind(entry, options):
                made.mounts[index] = _open_bind(entry, options, propagation_of_root(config), plan)
        if plan.has_user():
            for node in devices_in_root(entries, wanted):
                made.devices[node.path] = node.bind_host()
    except OSError:
        made.close()
        raise
    return made


def _open_bind(entry: dict[str, Any], options: Options, of_root: int, plan: Plan) -> int:
    fd = mounts.bind(entry["source"], recursive=options.recursive)
    try:
        if options.idmap or entry.get("uidMappings"):
            _map_owners(fd, entry, options, plan)
        mounts.change(fd, options.own)
        mounts.change(fd, options.all_below, recursive=True)
        wanted = options.propagation or of_root or SLAVE
        if wanted & linux.MS_SHARED and plan.has_user():
            mounts.propagate(fd, SLAVE if wanted & linux.MS_REC else linux.MS_SLAVE)
        mounts.propagate(fd, wanted)
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, error.strerror, entry["source"]) from None
    return fd


def _map_owners(fd: int, entry: dict[str, Any], options: Options, plan: Plan) -> None:
    """The mount's own mapping, or else the container's (`idmap`); `ridmap` is for all mounts below it too."""
    uids, gids = (namespaces.id_map(entry.get(name)) for name in ("uidMappings", "gidMappings"))
    userns = process.user_namespace(uids or plan.uids, gids or plan.gids)
    try:
        mounts.set_idmap(fd, userns, recursive=options.idmap == "ridmap")
    finally:
        os.close(userns)
