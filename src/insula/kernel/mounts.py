"""Mounts as file descriptors: created detached, attached later, unmounted when the last descriptor is closed.

Since Linux 5.2 a mount can exist outside of the tree: fsmount(2) and open_tree(2) return a descriptor of a *detached*
mount, and move_mount(2) attaches it. This has three advantages:

- Mounts that need the host's privileges (an overlay, an idmapped layer, a device node) are created outside the
  container and passed in as descriptors.
- A mount target is a descriptor too. It is opened below the container's root with openat2(2), so symbolic links of a
  hostile image can't lead out of it.
- Nothing is left behind when a process dies half-way, because the kernel closes its descriptors.

An overlay (Documentation/filesystems/overlayfs.rst) has `lower` directories, which are shared and never written,
`upper`, which takes the container's writes, and `work`, for overlayfs itself. An *idmapped* mount (mount_setattr(2))
shows files that belong to users 0…65535 on disk as files of another range of IDs, such as a tenant's.
"""

from __future__ import annotations

import errno
import os
import stat

from insula.kernel import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from insula.kernel.mount_options import Attributes

_MAX_VALUE = 255  # bytes of a value that fsconfig(2) takes
_MAX_LINKS = 40  # symbolic links followed in one path, as in the kernel


def filesystem(
    fstype: str, data: Sequence[str] = (), attributes: int = 0, source: str | None = None, place: str = "/dev"
) -> int:
    """Make a detached mount of a new file system; `data` has ``key=value`` or ``flag`` items.

    Values that are too long for fsconfig(2) need the old mount(2): it mounts on `place`, a directory of the caller's
    mount namespace, for a moment.
    """
    if any(len(os.fsencode(option.partition("=")[2])) > _MAX_VALUE for option in data):
        syscalls.mount(source or fstype, place, fstype, 0, ",".join(data))
        try:
            return bind(place, attributes=attributes)
        finally:
            syscalls.umount2(place, syscalls.MNT_DETACH)
    context = syscalls.fsopen(fstype)
    try:
        if source is not None:
            syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, "source", source)
        for option in data:
            key, equals, value = option.partition("=")
            if equals:
                syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, key, value)
            else:
                syscalls.fsconfig(context, syscalls.FSCONFIG_SET_FLAG, key)
        syscalls.fsconfig(context, syscalls.FSCONFIG_CMD_CREATE)
        return syscalls.fsmount(context, attributes)
    except OSError as error:
        raise _with_log(context, error, fstype) from None
    finally:
        os.close(context)


def overlay(lower: Sequence[str], upper: str, work: str, *, volatile: bool = False) -> int:
    """Make a detached overlay; `lower` is topmost first. `volatile` skips syncs, so a crash may lose its writes.

    All options together must fit into one page: use short paths, which may be relative.
    """
    data = [f"lowerdir={':'.join(lower)}", f"upperdir={upper}", f"workdir={work}"]
    return filesystem("overlay", [*data, "volatile"] if volatile else data, source="overlay", place=work)


def bind(source: str, *, recursive: bool = False, attributes: int = 0, dirfd: int = syscalls.AT_FDCWD) -> int:
    """Make a detached copy of the mount at `source`, a file or a directory, with `attributes` set in addition."""
    flags = syscalls.OPEN_TREE_CLONE | (syscalls.AT_RECURSIVE if recursive else 0)
    fd = syscalls.open_tree(dirfd, source, flags | (syscalls.AT_EMPTY_PATH if not source else 0))
    try:
        if attributes:
            set_attributes(fd, attributes, recursive=recursive)
    except OSError:
        os.close(fd)
        raise
    return fd


def idmapped(source: str, userns: int) -> int:
    """Make a detached, read-only, idmapped copy of `source`: owners are mapped by the user namespace `userns`."""
    fd = syscalls.open_tree(syscalls.AT_FDCWD, source, syscalls.OPEN_TREE_CLONE)
    try:
        attributes = syscalls.MOUNT_ATTR_IDMAP | syscalls.MOUNT_ATTR_RDONLY
        syscalls.mount_setattr(fd, "", set_=attributes, userns=userns)
    except OSError:
        os.close(fd)
        raise
    return fd


def set_attributes(fd: int, attributes: int, *, recursive: bool = False) -> None:
    """Set attributes of the mount behind `fd` in addition to those that it has."""
    clear = 0x70 if attributes & 0x70 else 0  # MOUNT_ATTR__ATIME is a field, not flags
    flags = syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if recursive else 0)
    syscalls.mount_setattr(fd, "", set_=attributes, clear=clear, flags=flags)


def change(fd: int, attributes: Attributes, *, recursive: bool = False) -> None:
    """Set and clear attributes of the mount behind `fd`, with `recursive` also of all mounts below it."""
    if attributes:
        flags = syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if recursive else 0)
        syscalls.mount_setattr(fd, "", set_=attributes.set, clear=attributes.clear, flags=flags)


def propagate(fd: int, propagation: int) -> None:
    """Set the propagation type (MS_PRIVATE, MS_SLAVE, …) of the mount behind `fd`, with MS_REC also of all below it."""
    if propagation:
        flags = syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if propagation & syscalls.MS_REC else 0)
        syscalls.mount_setattr(fd, "", propagation=propagation & ~syscalls.MS_REC, flags=flags)


def set_idmap(fd: int, userns: int, *, recursive: bool = False) -> None:
    """Map the owners of the files of a detached mount by the user namespace `userns`."""
    flags = syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if recursive else 0)
    syscalls.mount_setattr(fd, "", set_=syscalls.MOUNT_ATTR_IDMAP, userns=userns, flags=flags)


def attach(mount: int, target: int, propagation: int = 0) -> None:
    """Attach a detached mount on the file or directory behind `target`; an attached mount is moved there."""
    syscalls.move_mount(mount, target, "", syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH)
    propagate(mount, propagation)


def open_beneath(root: int, path: str, *, links: bool = True, flags: int = os.O_PATH) -> int:
    """Open `path` as a process whose root is `root` would; without `links`, symbolic links are refused (ELOOP)."""
    resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS | (0 if links else syscalls.RESOLVE_NO_SYMLINKS)
    return syscalls.openat2(root, path.lstrip("/") or ".", flags, resolve=resolve)


def make_target(root: int, path: str, *, directory: bool, links: bool = True) -> int:
    """Open a mount target below `root`, creating missing components; returns an O_PATH descriptor.

    Every component is opened inside the root, so links of a hostile image can't lead out of it. The target of a
    dangling link is created, inside the root as well.
    """
    try:
        fd = open_beneath(root, path, links=links)
    except FileNotFoundError:
        fd = _make_path(root, path, directory=directory, links=links)
    if stat.S_ISDIR(os.fstat(fd).st_mode) != directory:
        os.close(fd)
        raise OSError(errno.ENOTDIR if directory else errno.EISDIR, "cannot mount over it", path)
    return fd


def make_link(root: int, path: str, content: str) -> None:
    """Make a symbolic link at `path` below `root`, and what is missing on the way to it.

    OSError with EEXIST if there is something else than a link with this content.
    """
    above, _, name = os.path.normpath("/" + path).rpartition("/")
    directory = make_target(root, above or "/", directory=True)
    try:
        os.symlink(content, name, dir_fd=directory)
    except FileExistsError as error:
        try:
            same = os.readlink(name, dir_fd=directory) == content
        except OSError:
            same = False
        if not same:
            raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(directory)


def _make_path(root: int, path: str, *, directory: bool, links: bool) -> int:
    """Create `path` below `root` as mkdir(1) -p does, and return an O_PATH descriptor.

    The last component becomes a file unless `directory`.
    openat2(2) creates nothing at the end of a symbolic link, so links are followed here (path_resolution(7)): one
    component after another, each from the descriptor of the directory before. ``..`` returns to the directory opened
    before, and stays at the root. OSError (ELOOP) at a link without `links`, or after 40 links.
    """
    opened = [os.dup(root)]  # the directories from the root to the current one
    wanted = path.split("/")[::-1]  # the remaining components, the next one last
    followed = 0
    try:
        while wanted:
            name = wanted.pop()
            if name in ("", "."):
                continue
            if name == "..":
                if len(opened) > 1:
                    os.close(opened.pop())
                continue
            fd = _open_or_make(opened[-1], name, directory=directory or any(part not in ("", ".") for part in wanted))
            kind = stat.S_IFMT(os.fstat(fd).st_mode)
            if kind != stat.S_IFLNK:
                opened.append(fd)
                continue
            target = os.readlink("", dir_fd=fd)
            os.close(fd)
            followed += 1
            if not links or followed > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            if target.startswith("/"):
                while len(opened) > 1:
                    os.close(opened.pop())
            wanted += target.split("/")[::-1]
        return os.dup(opened[-1])
    finally:
        for fd in opened:
            os.close(fd)


def _open_or_make(at: int, name: str, *, directory: bool) -> int:
    """Open `name` in the directory behind `at` with O_PATH, creating it if it is missing; no link is followed."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=at)
    except FileNotFoundError:
        try:
            if directory:
                os.mkdir(name, 0o755, dir_fd=at)
            else:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=at))
        except FileExistsError:  # another container that mounts the same volume has just created it
            pass
        return os.open(name, flags, dir_fd=at)


def _with_log(context: int, error: OSError, fstype: str) -> OSError:
    """Return `error` with the kernel's explanation, which is read from the file system context (fsopen(2))."""
    lines = []
    try:
        while line := os.read(context, 1024):
            lines.append(line.decode("utf-8", "replace").strip()[2:])
    except OSError:
        pass
    text = f"{fstype}: {'; '.join(lines)}" if lines else f"mount {fstype}: {error.strerror}"
    return OSError(error.errno, text, error.filename)
