"""Copy files into and out of a container as tar streams, in a process that has only the container's rights.

The container is hostile, and may change its files and mounts during the copy. Docker had two such faults: a link that
was exchanged between check and use (CVE-2018-15664), and the host's tar loading the container's libraries
(CVE-2019-14271). They are avoided by construction:

- A process of its own does the work, and enters the container's user namespace (setns(2)) before it opens the first
  file. Root there is an ordinary user of the host. So whatever file a name leads to, the process can do no more to it
  than the container's own root. It enters no other namespace: no process inside sees it, and it loads nothing from
  there.
- The root is a descriptor, and the path that the user gave is resolved by the kernel inside it (openat2(2),
  RESOLVE_IN_ROOT): a link or ``..`` can't lead out, and magic links of /proc aren't followed at all.
- Below it `insula.tree` opens one name after the other and follows no link, so that no other user of the container can
  have files of its root changed.
- Only mounts of file systems that store files are copied, which keeps /proc, /sys and devices out of archives. That is
  no protection: the container can mount an overlay over something else, and IDs of mounts are used again.
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
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

MEMORY = 1 << 30
"""Bytes of address space: a hostile archive or tree costs memory of this process alone, and no more than this."""

_BUFFER = 1 << 18
_FILESYSTEMS = frozenset("overlay tmpfs rootfs ext2 ext3 ext4 xfs btrfs f2fs zfs bcachefs".split())  # noqa: SIM905
IDS = 65536
_NOBODY = IDS - 1
_MAX_LINKS = 40  # as path_resolution(7)
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class FileTree:
    """A container's files: a descriptor of its root, and the IDs of the mounts that are copied."""

    def __init__(self, root: int, mounts: frozenset[int]) -> None:
        self.root, self.mounts = root, mounts

    def allowed(self, fd: int) -> bool:
        return mount_number(fd) in self.mounts


@contextmanager
def opened(pid: int, started: int) -> Iterator[FileTree]:
    """Open the files of the container whose PID 1 is (pid, start time). NotFound if that process is gone."""
    try:
        root = os.open(f"{process.directory(pid)}/root", _DIRECTORY)
        try:
            numbers = frozenset(_places(pid))
            if not process.is_alive(pid, started):  # asked last: all that was opened was this process's
                raise ProcessLookupError
            if os.path.samestat(os.fstat(root), os.stat("/")):
                raise Failed("that process has the host's root", "it is no container; nothing was touched")
            yield FileTree(root, numbers)
        finally:
            os.close(root)
    except (ProcessLookupError, FileNotFoundError):
        raise NotFound("the container ended meanwhile", "try again") from None


def _places(pid: int) -> Iterator[int]:
    """The IDs of mounts whose file systems store files (proc_pid_mountinfo(5))."""
    with open(f"{process.directory(pid)}/mountinfo", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.split(" ", 1)[0] in _FILESYSTEMS:
                yield int(before.split(" ", 1)[0])


def become_root_inside(pid: int, started: int) -> None:
    """Enter the user namespace of (pid, start time) as its root. The caller has a single thread and can't go back."""
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
    """Turn an OSError about the path into an InsulaError."""
    shown = shorten(path)
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"there is no {shown} in the instance", "look with `insula exec NAME ls`") from None
    except NotADirectoryError:
        raise Invalid(f"{shown} is not a directory in the instance", "name one") from None
    except tarfile.TarError as error:
        raise Invalid(f"that is no tar archive: {error}", "send one that tar(1) reads") from None
    except BrokenPipeError:  # the reader is gone
        raise
    except OSError as error:
        raise Failed(f"copying {shown} failed: {error.strerror or error}", "look at the path and the disk") from None


# -- out -----------------------------------------------------------------------------------------------------------


def write(tree: FileTree, path: str, sink: BinaryIO) -> None:
    """Write the file or tree at `path` as a tar, whose entries begin with the last component of the path.

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


def export(tree: FileTree, sink: BinaryIO) -> None:
    """Write the root file system as a tar, without other mounts in it."""
    with _errors("/"):
        only = mount_number(tree.root)
        _send(Packer(allowed=lambda fd: mount_number(fd) == only, fifos=True), tree.root, ".", ".", sink)


def _send(packer: Packer, directory: int, name: str, shown: str, sink: BinaryIO) -> None:
    """Write the archive; if it fails, an entry at its end has the reason, and the error is raised as well."""
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


def read(tree: FileTree, path: str, source: BinaryIO, copy: str | None = None) -> None:
    """Unpack a tar into the directory `path`, or with `copy` its only tree where cp(1) would put it.

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


def _target(tree: FileTree, path: str) -> tuple[int, str]:
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
    """Refuse what cp(1) refuses: a directory over a file, and a file at a directory that does not exist."""
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


def _enter(pid: int, start_time: int) -> None:
    try:
        become_root_inside(pid, start_time)
    except OSError as error:
        raise Failed(f"the instance's user namespace can't be entered: {error.strerror}", "try again") from None


def main() -> None:
    """Carry out the command line: write, read or export."""
    verb, pid, start_time, path, copy = json.loads(sys.argv[1])
    if verb == "read":  # before the change of user: tarfile imports them when an archive asks for it
        import bz2  # noqa: F401
        import gzip  # noqa: F401
        import lzma  # noqa: F401
    carry_out(verb, pid, start_time, path, copy)


def carry_out(
    verb: str, pid: int, start_time: int, path: str, copy: str | None, enter: Callable[[int, int], None] = _enter
) -> None:
    """Do the work of this process, which is write, read or export, and report an error. `enter` takes on the rights
    of the container; in a guest there are no others."""
    import resource

    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        _work(verb, pid, start_time, path, copy, enter)
    except InsulaError as error:
        _fail(error)
    except BrokenPipeError:
        os._exit(1)
    except MemoryError:
        _fail(Invalid(f"copying that takes more than {MEMORY >> 20} MiB of memory", "copy parts of it"))


def _work(
    verb: str, pid: int, start_time: int, path: str, copy: str | None, enter: Callable[[int, int], None] = _enter
) -> None:
    with opened(pid, start_time) as tree:
        enter(pid, start_time)
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
