"""Files in and out of a container as tar streams, by a process that has the container's rights and no others.

The container is hostile, and may change its files and mounts while we walk them. What Docker got wrong (CVE-2018-15664,
a link swapped in between check and use; CVE-2019-14271, the container's libraries loaded by the host's tar) is avoided
by construction:

- The work is done by a process of its own, which enters the container's user namespace (setns(2)) before it looks at
  the first file. Root there is an ordinary user of the host: whatever a name comes to mean, a file of the host's least
  of all, nothing happens to it that the container's own root could not do. Only the user namespace is entered: the
  process is in nobody's sight inside, and loads nothing from there.
- The root is a descriptor, and the path that the user gave is resolved by the kernel inside it (openat2(2),
  RESOLVE_IN_ROOT): a link or ``..`` can't lead out, and magic links of /proc aren't followed at all.
- Below it `insula.tree` opens one name after the other and follows no link, so that of the container's own users none
  can have root's files changed either.
- Only mounts whose file system is made for files are copied. That keeps /proc, /sys and devices out of archives; it
  guards nothing, so it does not matter that the container can mount an overlay over something else, or that numbers of
  mounts are used again.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
from contextlib import ExitStack, contextmanager

from insula.kernel import mounts, process, syscalls
from insula.model.errors import Conflict, Failed, InsulaError, Invalid, NotFound
from insula.model.units import shorten
from insula.tree.failures import last_words
from insula.tree.pack import Packer
from insula.tree.unpack import Rules, mount_number, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

MEMORY = 1 << 30
"""Bytes of address space: a hostile archive or tree costs memory of this process alone, and no more than this."""

_BUFFER = 1 << 18
_FILESYSTEMS = frozenset("overlay tmpfs ext2 ext3 ext4 xfs btrfs f2fs zfs bcachefs".split())  # noqa: SIM905
IDS = 65536
_NOBODY = IDS - 1
_MAX_LINKS = 40  # as path_resolution(7)
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Tree:
    """A container's files: its root, and the mounts that are copied, by their numbers."""

    def __init__(self, root: int, mounts: frozenset[int]) -> None:
        self.root, self.mounts = root, mounts

    def allowed(self, fd: int) -> bool:
        return mount_number(fd) in self.mounts


@contextmanager
def opened(pid: int, started: int) -> Iterator[Tree]:
    """The files of the container whose PID 1 is (pid, start time). NotFound if that process is gone."""
    try:
        root = os.open(f"{process.directory(pid)}/root", _DIRECTORY)
        try:
            numbers = frozenset(_places(pid))
            if not process.is_alive(pid, started):  # asked last: all that was opened was this process's
                raise ProcessLookupError
            if os.path.samestat(os.fstat(root), os.stat("/")):
                raise Failed("that process has the host's root", "it is no container; nothing was touched")
            yield Tree(root, numbers)
        finally:
            os.close(root)
    except (ProcessLookupError, FileNotFoundError):
        raise NotFound("the container ended meanwhile", "try again") from None


def _places(pid: int) -> Iterator[int]:
    """The numbers of mounts that hold files (proc_pid_mountinfo(5))."""
    with open(f"{process.directory(pid)}/mountinfo", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.split(" ", 1)[0] in _FILESYSTEMS:
                yield int(before.split(" ", 1)[0])


def become_root_inside(pid: int, started: int) -> None:
    """Enter the user namespace of (pid, start time), for good, as its root. Takes a process of a single thread."""
    userns = process.open_namespace(pid, started, "user")
    try:
        syscalls.setns(userns, syscalls.CLONE_NEWUSER)  # EINVAL if it is the host's
    finally:
        os.close(userns)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """What the kernel says of the path, for the user."""
    shown = shorten(path)
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"there is no {shown} in the instance", "look with `insula exec NAME ls`") from None
    except NotADirectoryError:
        raise Invalid(f"{shown} is not a directory in the instance", "name one") from None
    except tarfile.TarError as error:
        raise Invalid(f"that is no tar archive: {error}", "send one that tar(1) reads") from None
    except BrokenPipeError:  # nobody wants the rest
        raise
    except OSError as error:
        raise Failed(f"copying {shown} failed: {error.strerror or error}", "look at the path and the disk") from None


# -- out -----------------------------------------------------------------------------------------------------------


def write(tree: Tree, path: str, sink: BinaryIO) -> None:
    """The file or tree at `path` as a tar; its entries begin with the last part of the path.

    A link at the end of the path is copied as a link, unless the path ends with a slash. NotFound, Invalid, Failed.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    name = parts[-1] if parts and parts[-1] != ".." else ""
    inside = not name or path.endswith(("/", "/."))
    with _errors(path), ExitStack() as stack:
        where = path if inside else "/".join(parts[:-1])
        parent = mounts.open_beneath(tree.root, where, flags=_DIRECTORY)
        stack.callback(os.close, parent)
        if not inside:
            os.stat(name, dir_fd=parent, follow_symlinks=False)  # before the archive begins
        if not tree.allowed(parent):
            raise Invalid(f"{shorten(path)} holds no files", "name one that is on a disk or tmpfs")
        _send(Packer(allowed=tree.allowed, fifos=True), parent, "." if inside else name, name or ".", sink)


def export(tree: Tree, sink: BinaryIO) -> None:
    """The whole root file system as a tar, without what is mounted in it."""
    with _errors("/"):
        only = mount_number(tree.root)
        _send(Packer(allowed=lambda fd: mount_number(fd) == only, fifos=True), tree.root, ".", ".", sink)


def _send(packer: Packer, directory: int, name: str, shown: str, sink: BinaryIO) -> None:
    """Write the archive; one that breaks off says why at its end, besides the error itself."""
    begun = False
    try:
        for piece in packer.pack(directory, name, shown):
            sink.write(piece)
            begun = True
    except InsulaError as error:
        if begun and packer.between:
            sink.write(last_words(error))
        raise
    finally:
        sink.flush()


# -- in ------------------------------------------------------------------------------------------------------------


def read(tree: Tree, path: str, source: BinaryIO, copy: str | None = None) -> None:
    """Unpack a tar into the directory `path`; or with `copy` put the one tree that it has where cp(1) would.

    "tree": into `path` if that is a directory, under its own name, and else as `path`. "content": what is in it goes
    into the directory `path`, which is made if it isn't there. A link at the end of `path` is followed. NotFound,
    Invalid, Conflict, Failed. What was unpacked before an error stays.
    """
    with _errors(path), ExitStack() as stack:
        rules = Rules(
            path,
            owner=lambda member: (_inside(member.uid), _inside(member.gid)),
            mode=0o7777,
            allowed=tree.allowed,
            fifos=True,
            leave_out=_refuse_device,
        )
        top, name = _target(tree, path) if copy else (mounts.open_beneath(tree.root, path, flags=_DIRECTORY), "")
        stack.callback(os.close, top)
        if not tree.allowed(top):
            raise Invalid(f"{shorten(path)} holds no files", "name a directory that is on a disk or tmpfs")
        if not name:
            unpack(source, top, rules, form="r|*", instead=[] if copy == "content" else None)
            return

        def first(member: tarfile.TarInfo) -> None:
            _check_target(top, name, path, member.isdir())

        rules.where = os.path.dirname(path.rstrip("/"))
        unpack(source, top, rules, form="r|*", instead=[name], first=first)


def _target(tree: Tree, path: str) -> tuple[int, str]:
    """The directory that a copy goes to, and the name that it gets there; no name where `path` is the directory."""
    for _ in range(_MAX_LINKS):
        try:
            return mounts.open_beneath(tree.root, path, flags=_DIRECTORY), ""
        except (FileNotFoundError, NotADirectoryError):
            above, _, name = path.rstrip("/").rpartition("/")
            if name in ("", ".", ".."):
                raise
        parent = mounts.open_beneath(tree.root, above, flags=_DIRECTORY)
        try:
            link = os.readlink(name, dir_fd=parent)
        except FileNotFoundError:  # it is to be made
            return parent, name
        except OSError:  # EINVAL: it is no link
            return parent, name
        os.close(parent)
        path = os.path.join(above or "/", link) + ("/" if path.endswith("/") else "")
    raise Invalid(f"{shorten(path)} leads through too many links", "name another place")


def _check_target(top: int, name: str, path: str, directory: bool) -> None:
    """What cp(1) refuses: a directory in place of a file, and a file in place of a directory that isn't there."""
    try:
        os.stat(name, dir_fd=top, follow_symlinks=False)
    except FileNotFoundError:
        if path.endswith("/") and not directory:
            raise NotFound(f"there is no directory {shorten(path)} in the instance", "make it first") from None
        return
    if directory or path.endswith("/"):
        raise Conflict(f"{shorten(path)} is no directory in the instance", "choose another name")


def _inside(number: int) -> int:
    return number if 0 <= number < IDS else _NOBODY


def _refuse_device(shown: str) -> None:
    raise Invalid(f"{shorten(shown)} is a device", "leave devices out of the archive")


# -- the process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Does the job that the command line names."""
    import resource

    verb, pid, start_time, path, copy = json.loads(sys.argv[1])
    if verb == "read":  # before the change of user: tarfile imports them when an archive asks for it
        import bz2  # noqa: F401
        import gzip  # noqa: F401
        import lzma  # noqa: F401
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        _work(verb, pid, start_time, path, copy)
    except InsulaError as error:
        _fail(error)
    except BrokenPipeError:
        os._exit(1)
    except MemoryError:
        _fail(Invalid(f"copying that takes more than {MEMORY >> 20} MiB of memory", "copy parts of it"))


def _work(verb: str, pid: int, start_time: int, path: str, copy: str | None) -> None:
    with opened(pid, start_time) as tree:
        try:
            become_root_inside(pid, start_time)
        except OSError as error:
            raise Failed(f"the instance's user namespace can't be entered: {error.strerror}", "try again") from None
        if verb == "read":
            with os.fdopen(0, "rb", _BUFFER) as source:
                read(tree, path, source, copy)
                while source.read(_BUFFER):  # what follows the archive's end
                    pass
            return
        with os.fdopen(1, "wb", _BUFFER) as sink:
            export(tree, sink) if verb == "export" else write(tree, path, sink)


def _fail(error: InsulaError) -> None:
    os.write(2, json.dumps(error.to_dict()).encode())
    os._exit(1)
