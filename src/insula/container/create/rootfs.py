"""The container's view of files: its mount tree, made inside its own mount namespace, and how it becomes the root.

In order, as the runtime-spec has it: the root file system, every entry of `mounts` as it is listed, devices, masked and
read-only paths, the new root. What takes the host's rights is opened by `insula.container.create.sources`. Two rules
make it safe on any image, however hostile:

- *Targets are descriptors.* Each is opened below the container's root with openat2(2) and RESOLVE_IN_ROOT, and mounted
  on as what was opened, so that a symbolic link, even one put there meanwhile, leads nowhere outside (CVE-2021-30465).
- *Masks are checked.* A masked file is covered by the null device and by nothing else that may be at /dev/null
  (CVE-2025-31133); no link is followed on the way to what is protected, or to /proc and /sys (CVE-2019-19921).

Most of the tree is alike for many containers: /proc, /sys and /dev with what is below them. That part, planned by a
`PremountPlan`, can be made before it is known which container it is for: over the /proc, /sys and /dev that were copied
from the parent with its mount namespace. When the root is there, these mounts move into it with all that is mounted on
them. `insula-oci` makes no premounts: there the listed order is also that of the mounts' IDs.

    premounts                            the rest
    /proc ← proc, masked                 / ← root
    /sys  ← sysfs, masked                  move /proc, /sys, /dev to the root's
    /dev  ← tmpfs, /dev/pts, /dev/shm      the other mounts, devices, paths; pivot_root(2)
"""

from __future__ import annotations

import errno
import os
import stat

from insula.container.create import cgroup_mount, devices
from insula.container.create.sources import (
    changes_only,
    covers,
    destination,
    devices_in_root,
    finish_bind,
    is_bind,
    is_idmapped,
    propagation_of_root,
)
from insula.container.create.stdio import is_null_device, open_null
from insula.container.create.steps import Steps, step
from insula.kernel import mounts, syscalls
from insula.kernel.mount_options import MountOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from insula.container.create.cgroup_mount import Groups
    from insula.container.create.namespaces import Plan
    from insula.container.create.sources import PreparedMounts

API_FILESYSTEMS = ("/proc", "/sys", "/dev")
"""The directories of premounts, which every Linux system has."""
_CGROUP = ("cgroup", "cgroup2")
VOLUME = "insula.volume"
"""The type of an entry of `mounts` that stands for a directory of the root itself, which is made if it is missing. With
the option `rw` it is a mount of its own, so that it stays writable when the root is made read-only."""
_NO_LINKS = ("proc", "sysfs")
_NOTHING = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC


# -- premounts ---------------------------------------------------------------------------------------------------------


class PremountPlan:
    """The part of a config's mount tree that doesn't depend on which container it is for.

    `entries` are of `mounts`, with their index; `masked` and `readonly` are paths below /proc, /sys and /dev. Two
    configs with equal plans can have the same warm container.
    """

    __slots__ = ("entries", "masked", "readonly")

    def __init__(self, config: dict[str, Any]) -> None:
        self.entries: dict[int, dict[str, Any]] = {}
        others: list[str] = []  # where mounts go that are not premounts
        tops: set[str] = set()
        own = config["linux"]
        # without a namespace that makes its group the root, the group's directory is bound from the host's /sys
        bound = _CGROUP if not any(n["type"] == "cgroup" and not n.get("path") for n in own["namespaces"]) else ()
        for index, entry in enumerate(config.get("mounts") or ()):
            path = destination(entry)
            # what lies below is no less in the way than what lies above: a later mount has to hide it
            free = not any(_related(path, other) for other in others)
            if free and entry.get("type") not in bound and _can_be_premounted(entry, path, tops):
                self.entries[index] = entry
                if path in API_FILESYSTEMS:
                    tops.add(path)
            else:
                others.append(path)
        self.masked, self.readonly = (
            [path for path in own.get(name) or () if _top(path) in tops and not any(_related(path, o) for o in others)]
            for name in ("maskedPaths", "readonlyPaths")
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PremountPlan) and all(getattr(self, n) == getattr(other, n) for n in self.__slots__)

    __hash__ = None  # type: ignore[assignment]


class Premounts:
    """The mounts on /proc, /sys and /dev that were made ahead, and /proc/sys as it was before it became read-only."""

    __slots__ = ("plan", "sysctl", "tops")

    def __init__(self, plan: PremountPlan, tops: dict[str, int], sysctl: int) -> None:
        self.plan, self.tops, self.sysctl = plan, tops, sysctl


def _can_be_premounted(entry: dict[str, Any], path: str, tops: set[str]) -> bool:
    options = MountOptions(entry.get("options") or ())
    if is_bind(entry, options) or changes_only(entry, options) or options.copy_up or is_sealed_late(entry, options):
        return False
    return path not in tops if path in API_FILESYSTEMS else _top(path) in tops


def _top(path: str) -> str:
    return "/" + path.lstrip("/").split("/", 1)[0]


def _related(path: str, other: str) -> bool:
    return covers(path, other) or covers(other, path)


def make_premounts(plan: PremountPlan, sources: PreparedMounts, groups: Groups) -> Premounts:
    """Mount them over the parent's /proc, /sys and /dev, and protect its paths. StepError names what failed."""
    tops: dict[str, int] = {}
    for index, entry in plan.entries.items():
        mount = sources.take(index)
        step(Steps.MOUNT, _premount_entry, tops, mount, entry, groups, about=entry["destination"])
    sysctl = -1
    if "/proc" in tops:
        sysctl = mounts.open_beneath(tops["/proc"], "sys", links=False, flags=os.O_PATH | os.O_DIRECTORY)
    step(Steps.PROTECT_PATHS, protect, PathResolver(tops), plan.masked, plan.readonly)
    return Premounts(plan, tops, sysctl)


def leave_host(premounts: Premounts) -> None:
    """Give up the parent's tree before there is a root to go to: an empty, read-only directory has to do.

    To detach the host's many mounts, and to wait until they are unused, takes as long as all that is left
    to do for a container. The root will lie over this one and is entered by chroot(2): who gets out of that is nowhere.
    """
    base = mounts.filesystem("tmpfs", ("mode=555", "size=4096", "nr_inodes=8"), _NOTHING, "tmpfs")
    try:
        syscalls.move_mount(base, syscalls.AT_FDCWD, "/")
        for path, mount in premounts.tops.items():
            os.mkdir(path[1:], 0o555, dir_fd=base)
            target = os.open(path[1:], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=base)
            mounts.attach(mount, target)
            os.close(target)
        enter(base, pivot=True)
        mounts.set_attributes(base, syscalls.MOUNT_ATTR_RDONLY)
    finally:
        os.close(base)


def _premount_entry(tops: dict[str, int], mount: int, entry: dict[str, Any], groups: Groups) -> None:
    options = MountOptions(entry.get("options") or ())
    path = destination(entry)
    grouped = mount < 0 and entry["type"] in _CGROUP
    if mount < 0 and not grouped:
        mount = mounts.filesystem(entry["type"], options.data, options.attributes, entry.get("source"))
    if path in API_FILESYSTEMS:
        syscalls.move_mount(mount, syscalls.AT_FDCWD, path)
        tops[path] = mount
        mounts.propagate(mount, options.propagation)
        return
    top = _top(path)
    target = mounts.make_target(tops[top], path.removeprefix(top), directory=True)
    try:
        if grouped:
            cgroup_mount.mount(target, options, groups)
        else:
            mounts.attach(mount, target, options.propagation)
    finally:
        os.close(target)
        if mount >= 0:
            os.close(mount)


# -- the rest ----------------------------------------------------------------------------------------------------------


class MountTree:
    """A container's mount tree while it is made: below `root`, a detached mount that is attached by `build`.

    `late` are mounts to make read-only in the end (`seal`): until then others are put into them.
    """

    def __init__(self, config: dict[str, Any], root: int, sources: PreparedMounts, groups: Groups, plan: Plan) -> None:
        self.config, self.root, self.sources, self.groups, self.plan = config, root, sources, groups, plan
        self.late: list[int] = []

    def build(self, premounts: Premounts | None, *, here: bool) -> None:
        """Attach the root and everything in it; StepError names what failed. The root then is what `enter` enters.

        With `here` it is attached in the current directory, which is the root file system's: there hooks look for the
        container's mounts before pivot_root(2). Else it is attached over /.
        """
        entries = self.config.get("mounts") or []
        step(Steps.ATTACH_ROOT, self._attach_root, here)
        for index, entry in enumerate(entries):
            about = entry["destination"]
            if premounts and index in premounts.plan.entries:
                if (path := destination(entry)) in API_FILESYSTEMS:
                    step(Steps.MOUNT, self._move, premounts.tops[path], entry, about=about)
                continue
            step(Steps.MOUNT, self._mount, index, entry, about=about)
        if not any(destination(entry) == "/dev" for entry in entries):
            step(Steps.MAKE_DEVICE_LINKS, devices.link_in_root, self.root)
        missing = devices_in_root(entries, devices.nodes(self.config["linux"].get("devices") or (), self.plan))
        if missing:
            bound = self.sources.take_devices()
            step(Steps.MAKE_DEVICES, devices.populate, self.root, missing, bound)

    def _attach_root(self, here: bool) -> None:
        if here:
            syscalls.move_mount(
                self.root, syscalls.AT_FDCWD, "", syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
            )
        else:
            syscalls.move_mount(self.root, syscalls.AT_FDCWD, "/")

    def _move(self, mount: int, entry: dict[str, Any]) -> None:
        """Move a premounts file system, with what is mounted on it, into the root."""
        links = entry["type"] not in _NO_LINKS
        target = mounts.make_target(self.root, entry["destination"], directory=True, links=links)
        try:
            mounts.attach(mount, target)
        finally:
            os.close(target)

    def _mount(self, index: int, entry: dict[str, Any]) -> None:
        """Attach one entry of `mounts`: made by the parent, or made here with the rights of the new namespaces."""
        options = MountOptions(entry.get("options") or ())
        if changes_only(entry, options):
            self._change(entry, options)
            return
        fstype = entry.get("type", "bind")
        if fstype == VOLUME:
            _volume(self.root, entry)
            return
        if (link := self.sources.links.get(index)) is not None:
            mounts.make_link(self.root, entry["destination"], link)
            return
        mount = self._from_inside(index, entry, options)
        if mount < 0:
            mount = self.sources.take(index)
        if fstype == "tmpfs" and mount < 0:
            self._copy_mode(entry, options)
        target = -1
        try:
            # nothing may redirect /proc or /sys: what masks paths in them would mask the wrong ones
            directory = mount < 0 or stat.S_ISDIR(os.fstat(mount).st_mode)
            links = fstype not in _NO_LINKS
            target = _make_target(self.root, entry["destination"], directory, links)
            if fstype in _CGROUP and mount < 0:
                cgroup_mount.mount(target, options, self.groups)
                return
            if mount < 0:
                mount = _make(fstype, entry, options, target)
            # what was made outside has its propagation already
            mounts.attach(mount, target, options.propagation or (0 if is_bind(entry, options) else self._propagation()))
            if is_sealed_late(entry, options):
                self.late.append(os.dup(mount))
        finally:
            for fd in (target, mount):
                if fd >= 0:
                    os.close(fd)

    def _propagation(self) -> int:
        kind = propagation_of_root(self.config)
        return kind if kind & syscalls.MS_REC else 0

    def _from_inside(self, index: int, entry: dict[str, Any], options: MountOptions) -> int:
        """A bind mount whose source lies in the root, as the entries before it left it; -1 if it is none."""
        if (path := self.sources.inside.get(index)) is None:
            return -1
        source = mounts.open_beneath(self.root, path)
        try:
            copy = mounts.bind("", recursive=options.recursive, dirfd=source)
        finally:
            os.close(source)
        if is_idmapped(entry, options):
            self.sources.map_owners(index, copy)
        return finish_bind(copy, entry, options, propagation_of_root(self.config), self.plan)

    def _copy_mode(self, entry: dict[str, Any], options: MountOptions) -> None:
        """A tmpfs gets the mode of the directory that it hides, unless its own is asked for."""
        if any(option.startswith("mode=") for option in options.data):
            return
        try:
            hidden = mounts.open_beneath(self.root, entry["destination"])
        except OSError:
            return
        options.data.append(f"mode={stat.S_IMODE(os.fstat(hidden).st_mode):o}")
        os.close(hidden)

    def _change(self, entry: dict[str, Any], options: MountOptions) -> None:
        """`remount`, or propagation alone: of the mount that is at the destination."""
        target = mounts.open_beneath(self.root, entry["destination"])
        try:
            mounts.change(target, options.own)
            mounts.change(target, options.all_below, recursive=True)
            mounts.propagate(target, options.propagation)
        finally:
            os.close(target)


def is_sealed_late(entry: dict[str, Any], options: MountOptions) -> bool:
    """Whether an entry becomes read-only only when all is mounted: a tmpfs begins without places to mount on."""
    return entry.get("type") == "tmpfs" and bool(options.attributes & syscalls.MOUNT_ATTR_RDONLY)


def _make_target(root: int, path: str, directory: bool, links: bool) -> int:
    try:
        return mounts.make_target(root, path, directory=directory, links=links)
    except OSError as error:
        if links or error.errno != errno.ELOOP:
            raise
        raise OSError(error.errno, "it must be mounted on ordinary directory, not through a link", path) from None


def _volume(root: int, entry: dict[str, Any]) -> None:
    """Make the directory of a VOLUME entry, and bind it onto itself if it is to stay writable.

    Only a directory of the root file system is bound. A link of the image may lead to another mount: bound onto itself,
    /proc would be there once more, over all that masks its paths.
    """
    target = mounts.make_target(root, entry["destination"], directory=True)
    try:
        if "rw" in entry["options"] and os.fstat(target).st_dev == os.fstat(root).st_dev:
            mount = mounts.bind("", dirfd=target)
            try:
                mounts.attach(mount, target)
            finally:
                os.close(mount)
    finally:
        os.close(target)


def _make(fstype: str, entry: dict[str, Any], options: MountOptions, target: int) -> int:
    attributes = options.attributes & ~(syscalls.MOUNT_ATTR_RDONLY if fstype == "tmpfs" else 0)
    mount = mounts.filesystem(fstype, options.data, attributes, entry.get("source"))
    if options.copy_up and fstype == "tmpfs":
        from insula.container.create.copy_up import copy_up

        copy_up(target, mount)
    return mount


def protect_paths(config: dict[str, Any], root: int, premounts: Premounts | None) -> None:
    """`maskedPaths` and `readonlyPaths`, for which everything has to be in its place."""
    own = config["linux"]
    masked, readonly = (
        [path for path in own.get(name) or () if not (premounts and path in done)]
        for name, done in (
            ("maskedPaths", premounts.plan.masked if premounts else ()),
            ("readonlyPaths", premounts.plan.readonly if premounts else ()),
        )
    )
    if masked or readonly:
        step(Steps.PROTECT_PATHS, protect, PathResolver({}, root), masked, readonly)


def seal(config: dict[str, Any], tree: MountTree) -> None:
    """Make read-only what shall be, when everything is in its place, /dev/console too: the root, and tmpfs."""
    for mount in tree.late:
        step(Steps.SEAL_MOUNTS, mounts.set_attributes, mount, syscalls.MOUNT_ATTR_RDONLY)
        os.close(mount)
    if config["root"].get("readonly"):
        step(Steps.SEAL_ROOT, mounts.set_attributes, tree.root, syscalls.MOUNT_ATTR_RDONLY)


def propagate_root(config: dict[str, Any], root: int) -> None:
    """`rootfsPropagation` of the root itself, once it is the root: pivot_root(2) takes no shared one."""
    if (kind := propagation_of_root(config)) and not kind & syscalls.MS_PRIVATE:
        step(Steps.SET_PROPAGATION, mounts.propagate, root, kind & ~syscalls.MS_REC)


def enter(root: int, *, pivot: bool) -> None:
    """Make `root` the only root there is.

    pivot_root(2) stacks the old root on the new one, and it is detached. chroot(2) does where nothing is to be
    detached, because `root` lies over an empty one.
    """
    os.fchdir(root)
    if pivot:
        syscalls.pivot_root(".", ".")
        syscalls.umount2(".", syscalls.MNT_DETACH)
    else:
        os.chroot(".")
    os.chdir("/")


def write_sysctl(root: int, premounts: Premounts | None, key: str, value: str) -> None:
    """A namespaced kernel parameter, below /proc/sys of the container."""
    if premounts and premounts.sysctl >= 0:
        fd = mounts.open_beneath(premounts.sysctl, sysctl_path(key), links=False, flags=os.O_WRONLY)
    else:
        fd = mounts.open_beneath(root, f"proc/sys/{sysctl_path(key)}", links=False, flags=os.O_WRONLY)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def sysctl_path(key: str) -> str:
    """The file of a parameter as sysctl(8) names it: ``net.ipv4.conf.eth0/1.mtu`` or ``net/ipv4/conf/eth0.1/mtu``."""
    slash, dot = key.find("/"), key.find(".")
    if slash >= 0 and (dot < 0 or slash < dot):
        return key
    return key.translate({ord("."): "/", ord("/"): "."})


# -- masked and read-only paths ----------------------------------------------------------------------------------------


class PathResolver:
    """Open paths of a container: below its root, or while there is no root, below one of the premounts."""

    def __init__(self, tops: dict[str, int], root: int = -1) -> None:
        self.tops, self.root = tops, root

    def open(self, path: str) -> int | None:
        """An O_PATH descriptor, no link followed; None if there is nothing at `path`."""
        path = os.path.normpath("/" + path.lstrip("/"))
        at = self.root
        if at < 0:
            at, path = self.tops[_top(path)], path.removeprefix(_top(path))
        try:
            return mounts.open_beneath(at, path, links=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open_null(self) -> int:
        """The container's null device, or else the host's; never another file."""
        fd = self.open("/dev/null") if self.root >= 0 or "/dev" in self.tops else None
        if fd is not None and is_null_device(fd):
            return fd
        if fd is not None:
            os.close(fd)
        return open_null()


def protect(places: PathResolver, masked: Iterable[str], readonly: Iterable[str]) -> None:
    """maskedPaths can't be read, readonlyPaths not written (OCI runtime-spec, config-linux.md)."""
    for path in _distinct(readonly):
        if (target := places.open(path)) is not None:
            copy = mounts.bind("", recursive=True, dirfd=target, attributes=syscalls.MOUNT_ATTR_RDONLY)
            mounts.attach(copy, target)
            os.close(copy)
            os.close(target)
    covers: dict[bool, int] = {}  # of directories and of files: the first one, of which the others are copies
    try:
        for path in _distinct(masked):
            if (target := places.open(path)) is None:
                continue
            directory = stat.S_ISDIR(os.fstat(target).st_mode)
            if directory in covers:
                mounts.attach(copy := mounts.bind("", dirfd=covers[directory]), target)
                os.close(copy)
            else:
                covers[directory] = _cover(places, directory)
                mounts.attach(covers[directory], target)
            os.close(target)
    finally:
        for fd in covers.values():
            os.close(fd)


def _distinct(paths: Iterable[str]) -> dict[str, None]:
    """Each path once, in order: what is listed twice is mounted on once."""
    return dict.fromkeys(os.path.normpath("/" + path.lstrip("/")) for path in paths)


def _cover(places: PathResolver, directory: bool) -> int:
    """Make a mount that hides a path: an empty directory, or a null device."""
    if directory:
        return mounts.filesystem("tmpfs", ("size=0", "mode=555"), syscalls.MOUNT_ATTR_RDONLY, "tmpfs")
    null = places.open_null()
    try:
        return mounts.bind("", dirfd=null, attributes=syscalls.MOUNT_ATTR_RDONLY)
    finally:
        os.close(null)
