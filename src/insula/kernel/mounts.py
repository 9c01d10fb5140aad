"""Mounts as file descriptors: made detached, attached later, gone when the last descriptor is closed.

Since Linux 5.2 a mount need not have a place in the tree: fsmount(2) and open_tree(2) answer with a descriptor,
and move_mount(2) attaches it. That has three uses here. What takes the host's rights (an overlay, an idmapped
layer, a device node) is made outside the container and handed in. A target is a descriptor too, opened below the
container's root with openat2(2), so a symbolic link in a hostile image leads nowhere. And nothing is left behind
when a process dies half-way: the kernel closes descriptors.

Of the overlay (overlayfs, Documentation/filesystems/overlayfs.rst): `lower` directories are shared and never
written, `upper` takes what the container writes, `work` is overlayfs' own. An *idmapped* mount (mount_setattr(2))
shows a layer's files, which belong to user 0…65535 on disk, as belonging to a tenant's own range.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from insula.kernel import linux

_ATTRIBUTES = {
    "ro": linux.MOUNT_ATTR_RDONLY,
    "nosuid": linux.MOUNT_ATTR_NOSUID,
    "nodev": linux.MOUNT_ATTR_NODEV,
    "noexec": linux.MOUNT_ATTR_NOEXEC,
    "noatime": linux.MOUNT_ATTR_NOATIME,
    "nodiratime": linux.MOUNT_ATTR_NODIRATIME,
    "strictatime": linux.MOUNT_ATTR_STRICTATIME,
    "nosymfollow": linux.MOUNT_ATTR_NOSYMFOLLOW,
}
_IGNORED = {"rw", "suid", "dev", "exec", "relatime", "defaults", "async", "diratime", "atime", "bind", "rbind"}
_MAX_VALUE = 255  # bytes of a value that fsconfig(2) takes
_PROPAGATION = {
    "private": linux.MS_PRIVATE,
    "rprivate": linux.MS_PRIVATE | linux.MS_REC,
    "slave": linux.MS_SLAVE,
    "rslave": linux.MS_SLAVE | linux.MS_REC,
    "shared": linux.MS_SHARED,
    "rshared": linux.MS_SHARED | linux.MS_REC,
    "unbindable": linux.MS_UNBINDABLE,
    "runbindable": linux.MS_UNBINDABLE | linux.MS_REC,
}


class Options(NamedTuple):
    """The options of an OCI mount, taken apart: attributes of the mount, propagation, data for the file system."""

    attributes: int
    propagation: int
    recursive: bool
    data: list[str]


def parse_options(options: Iterable[str]) -> Options:
    """Sort mount(8) options as the OCI runtime-spec lists them."""
    attributes = propagation = 0
    recursive, data = False, []
    for option in options:
        if option in _ATTRIBUTES:
            attributes |= _ATTRIBUTES[option]
        elif option in _PROPAGATION:
            propagation = _PROPAGATION[option]
        elif option in _IGNORED:
            recursive = recursive or option == "rbind"
        else:
            data.append(option)
    return Options(attributes, propagation, recursive, data)


def filesystem(fstype: str, data: Iterable[str] = (), attributes: int = 0, source: str | None = None) -> int:
    """A detached mount of a new file system; `data` as ``key=value`` or ``flag``."""
    context = linux.fsopen(fstype)
    try:
        if source is not None:
            linux.fsconfig(context, linux.FSCONFIG_SET_STRING, "source", source)
        for option in data:
            key, equals, value = option.partition("=")
            if equals:
                linux.fsconfig(context, linux.FSCONFIG_SET_STRING, key, value)
            else:
                linux.fsconfig(context, linux.FSCONFIG_SET_FLAG, key)
        linux.fsconfig(context, linux.FSCONFIG_CMD_CREATE)
        return linux.fsmount(context, attributes)
    except OSError as error:
        raise _with_log(context, error, fstype) from None
    finally:
        os.close(context)


def overlay(lower: Sequence[str], upper: str, work: str, *, volatile: bool = False) -> int:
    """A detached overlay; `lower` is topmost first. `volatile` skips syncs: for what needn't survive a crash.

    All options together must fit into one page: keep the paths short (they may be relative).
    """
    values = {"lowerdir": ":".join(lower), "upperdir": upper, "workdir": work}
    data = [f"{key}={value}" for key, value in values.items()] + (["volatile"] if volatile else [])
    if all(len(os.fsencode(value)) <= _MAX_VALUE for value in values.values()):
        return filesystem("overlay", data, source="overlay")
    # mount(2) takes more, but needs a place: on `work`, as long as it takes to copy the mount
    linux.mount("overlay", work, "overlay", 0, ",".join(data))
    try:
        return bind(work)
    finally:
        linux.umount2(work, linux.MNT_DETACH)


def bind(source: str, *, recursive: bool = False, attributes: int = 0, dirfd: int = linux.AT_FDCWD) -> int:
    """A detached copy of the mount at `source`, a file or a directory, with more attributes set."""
    flags = linux.OPEN_TREE_CLONE | (linux.AT_RECURSIVE if recursive else 0)
    fd = linux.open_tree(dirfd, source, flags | (linux.AT_EMPTY_PATH if not source else 0))
    try:
        if attributes:
            set_attributes(fd, attributes, recursive=recursive)
    except OSError:
        os.close(fd)
        raise
    return fd


def idmapped(source: str, userns: int) -> int:
    """A detached, read-only copy of `source` whose owners are shown through the user namespace `userns`."""
    fd = linux.open_tree(linux.AT_FDCWD, source, linux.OPEN_TREE_CLONE)
    try:
        attributes = linux.MOUNT_ATTR_IDMAP | linux.MOUNT_ATTR_RDONLY
        linux.mount_setattr(fd, "", set_=attributes, userns=userns)
    except OSError:
        os.close(fd)
        raise
    return fd


def set_attributes(fd: int, attributes: int, *, recursive: bool = False) -> None:
    """Set attributes of the mount behind `fd`, keeping those that it has."""
    clear = 0x70 if attributes & 0x70 else 0  # MOUNT_ATTR__ATIME is a field, not flags
    flags = linux.AT_EMPTY_PATH | (linux.AT_RECURSIVE if recursive else 0)
    linux.mount_setattr(fd, "", set_=attributes, clear=clear, flags=flags)


def attach(mount: int, target: int, propagation: int = 0) -> None:
    """Attach a detached mount on the file or directory behind `target`."""
    linux.move_mount(mount, target, "", linux.MOVE_MOUNT_F_EMPTY_PATH | linux.MOVE_MOUNT_T_EMPTY_PATH)
    if propagation:
        recursive = bool(propagation & linux.MS_REC)
        flags = linux.AT_EMPTY_PATH | (linux.AT_RECURSIVE if recursive else 0)
        linux.mount_setattr(mount, "", propagation=propagation & ~linux.MS_REC, flags=flags)


def open_beneath(root: int, path: str, *, links: bool = True, flags: int = os.O_PATH) -> int:
    """Open `path` as a process whose root is `root` would; without `links`, refuse symbolic links (ELOOP)."""
    resolve = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS | (0 if links else linux.RESOLVE_NO_SYMLINKS)
    return linux.openat2(root, path.lstrip("/") or ".", flags, resolve=resolve)


def make_target(root: int, path: str, *, directory: bool, links: bool = True) -> int:
    """Open the place for a mount below `root`, making what is missing of it; O_PATH descriptor.

    Every component is opened inside the root, so links of a hostile image can't lead out of it.
    """
    try:
        fd = open_beneath(root, path, links=links)
    except FileNotFoundError:
        parent, _, name = path.strip("/").rpartition("/")
        at = make_target(root, parent, directory=True, links=links)
        try:
            if directory:
                os.mkdir(name, 0o755, dir_fd=at)
            else:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=at))
        except FileExistsError:
            raise OSError(errno.ELOOP, "a symbolic link leads nowhere", path) from None
        finally:
            os.close(at)
        fd = open_beneath(root, path, links=links)
    if stat.S_ISDIR(os.fstat(fd).st_mode) != directory:
        os.close(fd)
        raise OSError(errno.ENOTDIR if directory else errno.EISDIR, "cannot mount over it", path)
    return fd


def _with_log(context: int, error: OSError, fstype: str) -> OSError:
    """`error` with the kernel's own explanation, which a failing file system context holds (fsopen(2))."""
    lines = []
    try:
        while line := os.read(context, 1024):
            lines.append(line.decode("utf-8", "replace").strip()[2:])
    except OSError:
        pass
    text = f"{fstype}: {'; '.join(lines)}" if lines else f"mount {fstype}: {error.strerror}"
    return OSError(error.errno, text, error.filename)
