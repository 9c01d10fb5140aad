"""Mount /sys/fs/cgroup inside: the container's own part of the control group tree (cgroups(7)).

In a cgroup namespace a new mount shows the container's group as its root. Without one it would show the whole tree of
the host, so the directory of the container's group is bound instead.

Version 2 is one file system. Version 1 is one for each hierarchy, below a tmpfs; a hierarchy of several controllers,
such as cpu,cpuacct, has a link for each of them.
"""

from __future__ import annotations

import os

from insula.kernel import mounts, syscalls
from insula.kernel.cgroups import hierarchy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.kernel.mount_options import MountOptions


class Groups:
    """The directories of the container's group, by controller; version 2 has one, with the name ``""``.

    `namespaced`: whether the container has a cgroup namespace of its own.
    """

    def __init__(self, directories: dict[str, str], namespaced: bool) -> None:
        self.directories = directories
        self.namespaced = namespaced


def own_directories() -> dict[str, str]:
    """The directories of the calling process's group, for a container that stays in it."""
    tree = hierarchy()
    with open("/proc/self/cgroup") as file:
        paths = {names: path for _, names, path in (line.rstrip("\n").split(":", 2) for line in file)}
    if tree.unified:
        return {"": tree.unified + paths.get("", "/")}
    found = {c: paths[names] for names in paths for c in names.split(",") if c in tree.controllers}
    return {controller: tree.controllers[controller] + path for controller, path in found.items()}


def mount(target: int, options: MountOptions, groups: Groups) -> None:
    """Mount the tree on the directory behind `target`."""
    if not groups.directories:
        raise OSError(2, "there is no control group to show")
    if "" in groups.directories:
        tree = _tree("cgroup2", (), groups.directories[""], options.attributes, groups.namespaced)
        try:
            mounts.attach(tree, target, options.propagation)
        finally:
            os.close(tree)
        return
    read_only = options.attributes & syscalls.MOUNT_ATTR_RDONLY
    tree = mounts.filesystem("tmpfs", ("mode=755", "size=65536"), options.attributes & ~read_only, "tmpfs")
    try:
        mounts.attach(tree, target, options.propagation)
        for directory, controllers in _hierarchies(groups.directories).items():
            _mount_hierarchy(tree, directory, controllers, options, groups.namespaced)
        if read_only:
            mounts.set_attributes(tree, read_only)
    finally:
        os.close(tree)


def _hierarchies(directories: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for controller, directory in directories.items():
        found.setdefault(directory, []).append(controller)
    return found


def _mount_hierarchy(
    tree: int, directory: str, controllers: list[str], options: MountOptions, namespaced: bool
) -> None:
    name = ",".join(controllers)
    os.mkdir(name, 0o755, dir_fd=tree)
    place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    try:
        group = _tree("cgroup", controllers, directory, options.attributes, namespaced)
        try:
            mounts.attach(group, place)
        finally:
            os.close(group)
    finally:
        os.close(place)
    if len(controllers) > 1:
        for controller in controllers:
            os.symlink(name, controller, dir_fd=tree)


def _tree(fstype: str, data: list[str] | tuple[str, ...], directory: str, attributes: int, namespaced: bool) -> int:
    if namespaced:
        return mounts.filesystem(fstype, data, attributes, fstype)
    return mounts.bind(directory, attributes=attributes)
