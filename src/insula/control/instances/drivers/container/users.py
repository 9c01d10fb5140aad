"""Resolves ``--user``: looks up names and numbers in the image's own /etc/passwd and /etc/group.

The image is hostile. Its /etc/passwd may be a symbolic link to the host's /etc/shadow, a FIFO that blocks, a device,
or endless. And it is spread over layers, of which the upper ones hide parts of the lower ones (overlayfs). So
`LayeredRoot` walks paths itself, one component at a time, with descriptors that never follow a link (O_PATH,
O_NOFOLLOW). Links are read and resolved here, against the root, and ``..`` never leaves it. Only a regular file is
opened for reading, and at most `MAX_SIZE` bytes of it are read.

Overlayfs marks what an upper layer hides: a *whiteout*, a character device 0/0, says that a name is not there; an
*opaque* directory, by its attribute trusted.overlay.opaque, that nothing below it shows through.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from insula.model.errors import Invalid
from insula.model.objects import IDS_PER_TENANT
from insula.model.rules import USER
from insula.model.units import shorten

MAX_SIZE = 1 << 20
"""A passwd or group file larger than this is refused."""

_MAX_STEPS = 40  # components and links on the way to a file; each may hold a descriptor in each layer
_MAX_HOME = 4095
_REPAIR = "use another image, or repair this one"
_MAX_GROUPS = 65536  # NGROUPS_MAX
_NAME = re.compile(USER)
_NUMBER = re.compile(r"[0-9]{1,10}", re.ASCII)


@dataclass(frozen=True)
class User:
    """The user of a process. `groups` are the supplementary groups; the primary `gid` is among them."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = (0,)
    home: str = "/"


def resolve(
    user: str, layers: Sequence[str | os.PathLike[str]], *, upper: str | None = None, more_groups: Sequence[str] = ()
) -> User:
    """The user that ``name|uid[:group|gid]`` means in the root of `layers`, the top-most first; "" is user 0.

    `more_groups` are supplementary groups besides those of /etc/group, as names or numbers. `upper` is the instance's
    own writable layer, above all of them. As in docker-run(1), a number need not be in the files; if it is, its group,
    home and supplementary groups are taken from there. An explicit group replaces the groups.
    Raises `Invalid` for unknown names, IDs beyond the tenant's range, and files that are unreadable or too large.
    """
    name, colon, group = user.partition(":")
    if not all(_NAME.fullmatch(part) for part in (name, group) if part) or (colon and not group) or (user and not name):
        raise Invalid(f"user {shorten(user)} is not valid", "write user, uid, user:group or uid:gid")
    for each in more_groups:
        if not _NAME.fullmatch(each):
            raise Invalid(f"group {shorten(each)} is neither a name nor a number", "name one of the image, or a number")
    with LayeredRoot([*([upper] if upper else []), *layers]) as root:
        return _resolve(name or "0", group, more_groups, root)


def _resolve(name: str, group: str, more_groups: Sequence[str], root: LayeredRoot) -> User:
    number = _id(name)
    found = next((e for e in _passwd(root) if e.name == name or e.uid == number), None)
    if found is None and number is None:
        raise Invalid(f"user {shorten(name)} is not in the image's /etc/passwd", "name one of the image, or a number")
    uid = found.uid if found else number or 0
    gid, home, groups = (found.gid, found.home, []) if found else (0, "/", [])
    if group:
        gid = _group(group, root)
    elif found:
        groups = [entry.gid for entry in _groups(root) if found.name in entry.members]
    groups = [*groups, *(_group(each, root) for each in more_groups)]
    for kind, value in (("user", uid), *(("group", g) for g in (gid, *groups))):
        if value >= IDS_PER_TENANT:
            raise Invalid(f"{kind} ID {value} is beyond the {IDS_PER_TENANT} of a tenant", "use an ID below 65536")
    return User(uid, gid, tuple(dict.fromkeys([gid, *groups]))[:_MAX_GROUPS], home)


def _group(group: str, root: LayeredRoot) -> int:
    number = _id(group)
    for entry in _groups(root):
        if entry.name == group or entry.gid == number:
            return entry.gid
    if number is None:
        raise Invalid(f"group {shorten(group)} is not in the image's /etc/group", "name one of the image, or a number")
    return number


# -- passwd(5) and group(5) -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Passwd:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class _Group:
    name: str
    gid: int
    members: frozenset[str]


def _passwd(root: LayeredRoot) -> Iterator[_Passwd]:
    for fields in _lines(root, "/etc/passwd"):
        if len(fields) >= 4 and (uid := _id(fields[2])) is not None and (gid := _id(fields[3])) is not None:
            home = fields[5] if len(fields) > 5 else ""  # as in Docker, a line may have fewer fields
            sound = home.startswith("/") and "\0" not in home and len(home.encode()) <= _MAX_HOME
            yield _Passwd(fields[0], uid, gid, home if sound else "/")


def _groups(root: LayeredRoot) -> Iterator[_Group]:
    for fields in _lines(root, "/etc/group"):
        if len(fields) >= 4 and (gid := _id(fields[2])) is not None:
            yield _Group(fields[0], gid, frozenset(fields[3].split(",")))


def _lines(root: LayeredRoot, path: str) -> Iterator[list[str]]:
    for line in root.read(path).decode("utf-8", "replace").split("\n"):
        if line and not line.startswith("#"):
            yield line.strip().split(":")


def _id(text: str) -> int | None:
    return int(text) if _NUMBER.fullmatch(text) else None


# -- a root made of layers ------------------------------------------------------------------------------------------


class LayeredRoot:
    """Reads files of a root file system given as overlayfs layers, without leaving it.

    One layer is a plain directory. Close it, or use it in a `with`.
    """

    def __init__(self, layers: Sequence[str | os.PathLike[str]]) -> None:
        self._stack = contextlib.ExitStack()
        with self._stack:
            self._top = [_open(layer, self._stack, flags=os.O_DIRECTORY) for layer in layers]
            self._stack = self._stack.pop_all()

    def __enter__(self) -> LayeredRoot:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, path: str) -> bytes:
        """The content of a regular file; b"" if there is none. `Invalid` if it is something else or over MAX_SIZE."""
        with contextlib.ExitStack() as opened:
            found = self._find(path, opened)
            if found is None:
                return b""
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise Invalid(f"the image's {path} is not a regular file", _REPAIR)
            # opened through the magic link of the O_PATH descriptor, since names can change meanwhile
            with open(_reopen(found), "rb") as file:
                data = file.read(MAX_SIZE + 1)
        if len(data) > MAX_SIZE:
            raise Invalid(f"the image's {path} is larger than {MAX_SIZE >> 20} MiB", _REPAIR)
        return data

    def _find(self, path: str, opened: contextlib.ExitStack) -> int | None:
        """An O_PATH descriptor of the file, links followed; None if it does not exist."""
        todo = _components(path)
        trail = [self._top]  # the directories on the path, each as the layers that it is merged from
        for _ in range(_MAX_STEPS):
            if not todo:
                return trail[-1][0]
            name = todo.pop()
            if name == "..":
                if len(trail) > 1:
                    trail.pop()
                continue
            found = self._lookup(trail[-1], name, opened)
            if not found:
                return None
            mode = os.fstat(found[0]).st_mode
            if stat.S_ISLNK(mode):
                target = os.readlink("", dir_fd=found[0])
                if target.startswith("/"):
                    trail = [self._top]
                todo += _components(target)
            elif stat.S_ISDIR(mode):
                trail.append(found)
            else:
                return None if todo else found[0]
        raise Invalid(f"the image's {path} leads through too many directories and links", _REPAIR)

    def _lookup(self, directory: list[int], name: str, opened: contextlib.ExitStack) -> list[int]:
        """Look up `name` in a merged directory: the layers of a directory, the top-most first, or one other file."""
        found: list[int] = []
        for layer in directory:
            try:
                fd = _open(name, opened, flags=os.O_NOFOLLOW, at=layer)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise Invalid(f"the image's {shorten(name)} is unreadable: {error.strerror}", _REPAIR) from None
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                found.append(fd)
                if _is_opaque(fd):
                    break
            else:
                whiteout = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
                return found or ([] if whiteout else [fd])
        return found


def _components(path: str) -> list[str]:
    """The components of a path in reverse order."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _open(path: str | os.PathLike[str], opened: contextlib.ExitStack, *, flags: int, at: int | None = None) -> int:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | flags, dir_fd=at)
    opened.callback(os.close, fd)
    return fd


def _reopen(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def _is_opaque(directory: int) -> bool:
    try:
        return os.getxattr(f"/proc/self/fd/{directory}", "trusted.overlay.opaque") == b"y"
    except OSError:
        return False
