"""Files in and out of a container as tar streams, by a process with all of the host's rights: so, with care.

The container is hostile, and may change its files while we walk them. What Docker got wrong (CVE-2018-15664, a link
swapped in between check and use; CVE-2019-14271, the container's libraries loaded by the host's tar) is avoided by
construction:

- the root is a descriptor, and the path that the user gave is resolved by the kernel inside it (openat2(2),
  RESOLVE_IN_ROOT): a link or ``..`` can't lead out, and magic links of /proc aren't followed at all;
- below it every step opens one name with O_NOFOLLOW: a link is an object to copy, never a way;
- only regular files are opened for reading, and writing always makes a new file (O_EXCL): what somebody swapped in
  is never written to;
- only file systems that hold files are touched. As the host's root, /proc and /sys would tell and do too much.

Owners are shifted: inside 0…65535 is `id_base`… on the host.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, BinaryIO

from insula.kernel import mounts, process
from insula.model.errors import Conflict, Failed, Invalid, NotFound
from insula.model.objects import IDS_PER_TENANT
from insula.model.units import shorten

_FILESYSTEMS = frozenset("overlay tmpfs ext2 ext3 ext4 xfs btrfs f2fs zfs bcachefs".split())  # noqa: SIM905
_NOBODY = IDS_PER_TENANT - 1
_DEPTH = 200  # directories within directories; each holds a descriptor
_CHUNK = 1 << 18
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Tree:
    """A container's files: its root, the IDs on it, and the mounts that may be touched (by their numbers)."""

    root: int
    id_base: int
    mounts: frozenset[int]

    def allowed(self, fd: int) -> bool:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            number = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
        return int(number) in self.mounts


@contextmanager
def opened(pid: int, started: int, id_base: int) -> Iterator[Tree]:
    """The files of the container whose PID 1 is (pid, start time). NotFound if that process is gone."""
    try:
        root = os.open(f"{process.directory(pid)}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            numbers = frozenset(_places(pid))
            if not process.is_alive(pid, started):  # asked last: all that was opened was this process's
                raise ProcessLookupError
            if os.path.samestat(os.fstat(root), os.stat("/")):
                raise Failed("that process has the host's root", "it is no container; nothing was touched")
            yield Tree(root, id_base, numbers)
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


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """What the kernel says, for the user."""
    shown = shorten(path)
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"there is no {shown} in the instance", "look with `insula exec NAME ls`") from None
    except NotADirectoryError:
        raise Invalid(f"{shown} is not a directory in the instance", "name one") from None
    except tarfile.TarError as error:
        raise Invalid(f"that is no tar archive: {error}", "send one that tar(1) reads") from None
    except OSError as error:
        if error.errno == 30:  # EROFS
            raise Conflict(f"{shown} is read-only in the instance", "copy to a tmpfs of it") from None
        raise Failed(f"copying {shown} failed: {error.strerror or error}", "look at the path and the disk") from None


# -- out -----------------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    tree: Tree
    tar: tarfile.TarFile
    seen: dict[tuple[int, int], str] = field(default_factory=dict)

    def add(self, directory: int, name: str, shown: str, depth: int) -> None:
        """The entry `name` of a directory, called `shown` in the archive, with all below it."""
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        info = self._info(found, shown)
        if stat.S_ISREG(found.st_mode):
            self._file(directory, name, info, found)
        elif stat.S_ISDIR(found.st_mode):
            self._directory(directory, name, info, depth)
        elif stat.S_ISLNK(found.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=directory)
            self.tar.addfile(info)
        elif stat.S_ISFIFO(found.st_mode):
            info.type = tarfile.FIFOTYPE
            self.tar.addfile(info)
        # devices mean nothing elsewhere, and sockets nothing without who listens

    def _info(self, found: os.stat_result, shown: str) -> tarfile.TarInfo:
        info = tarfile.TarInfo(shown)
        info.mode = stat.S_IMODE(found.st_mode)
        info.mtime = int(found.st_mtime)
        info.uid, info.gid = self._inside(found.st_uid), self._inside(found.st_gid)
        return info

    def _inside(self, number: int) -> int:
        number -= self.tree.id_base
        return number if 0 <= number < IDS_PER_TENANT else _NOBODY

    def _file(self, directory: int, name: str, info: tarfile.TarInfo, found: os.stat_result) -> None:
        link = (found.st_dev, found.st_ino)
        if found.st_nlink > 1 and link in self.seen:
            info.type, info.linkname = tarfile.LNKTYPE, self.seen[link]
            self.tar.addfile(info)
            return
        fd = os.open(name, _READ, dir_fd=directory)
        with os.fdopen(fd, "rb", buffering=0) as file:
            now = os.fstat(fd)
            if not stat.S_ISREG(now.st_mode) or not self.tree.allowed(fd):
                return
            info.size = now.st_size
            self.tar.addfile(info, _Exactly(file, now.st_size))
        if found.st_nlink > 1:
            self.seen[link] = info.name

    def _directory(self, directory: int, name: str, info: tarfile.TarInfo, depth: int) -> None:
        if depth > _DEPTH:
            raise Failed(f"{shorten(info.name)} is too deep in directories", f"copy less than {_DEPTH} levels")
        fd = os.open(name, _DIRECTORY, dir_fd=directory)
        try:
            info.type = tarfile.DIRTYPE
            self.tar.addfile(info)
            if self.tree.allowed(fd):
                self.below(fd, info.name, depth)
        finally:
            os.close(fd)

    def below(self, fd: int, shown: str, depth: int) -> None:
        for name in sorted(os.listdir(fd)):
            try:
                self.add(fd, name, f"{shown}/{name}", depth + 1)
            except FileNotFoundError:  # removed meanwhile
                continue


class _Exactly:
    """A file of just this size for tarfile, whatever the container does to it while we read."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self.left = size

    def read(self, size: int = -1) -> bytes:
        size = self.left if size < 0 else min(size, self.left)
        data = self.file.read(size) if size else b""
        data += bytes(size - len(data))
        self.left -= len(data)
        return data


def write(tree: Tree, path: str, sink: BinaryIO) -> None:
    """The file or tree at `path` as a tar; its entries begin with the last part of the path.

    A link at the end of the path is copied as a link, unless the path ends with a slash. NotFound, Invalid, Failed.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    name = parts[-1] if parts and parts[-1] != ".." else ""
    inside = not name or path.endswith(("/", "/."))
    with _errors(path), ExitStack() as stack:
        where = path if inside else "/".join(parts[:-1])
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        parent = mounts.open_beneath(tree.root, where, flags=flags)
        stack.callback(os.close, parent)
        if not inside:
            os.stat(name, dir_fd=parent, follow_symlinks=False)  # before the archive begins
        if not tree.allowed(parent):
            raise Invalid(f"{shorten(path)} holds no files", "name one that is on a disk or tmpfs")
        tar = stack.enter_context(tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK))
        writer = _Writer(tree, tar)
        if inside:
            writer.add(parent, ".", name or ".", 0)
        else:
            writer.add(parent, name, name, 0)


# -- in ------------------------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    tree: Tree
    top: int

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Makes what an entry of the archive says."""
        parts = _parts(member.name)
        if not parts:
            return  # the target itself
        with self._parent(parts) as directory:
            name = parts[-1]
            if member.isdir():
                self._make_directory(directory, name)
            else:
                self._clear(directory, name)
                self._make(tar, member, directory, name)
            self._own(member, directory, name)

    @contextmanager
    def _parent(self, parts: list[str]) -> Iterator[int]:
        """The directory that an entry is in, made if it isn't there; no link is followed on the way."""
        if len(parts) > _DEPTH:
            raise Invalid(f"{shorten('/'.join(parts))} is too deep in directories", f"use less than {_DEPTH} levels")
        at = os.dup(self.top)
        try:
            for part in parts[:-1]:
                try:
                    below = os.open(part, _DIRECTORY, dir_fd=at)
                except NotADirectoryError:
                    what = f"{shorten('/'.join(parts))} leads through something that is no directory"
                    raise Invalid(what, "links are not followed below the target") from None
                except FileNotFoundError:
                    os.mkdir(part, 0o755, dir_fd=at)
                    below = os.open(part, _DIRECTORY, dir_fd=at)
                    os.fchown(below, self.tree.id_base, self.tree.id_base)
                os.close(at)
                at = below
                if not self.tree.allowed(at):
                    raise Invalid(f"{shorten('/'.join(parts))} holds no files", "choose another place")
            yield at
        finally:
            os.close(at)

    def _make_directory(self, directory: int, name: str) -> None:
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=directory)
                os.mkdir(name, 0o700, dir_fd=directory)
        except FileNotFoundError:
            os.mkdir(name, 0o700, dir_fd=directory)

    def _clear(self, directory: int, name: str) -> None:
        """Removes what has the name; a directory must be empty."""
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            os.rmdir(name, dir_fd=directory)

    def _make(self, tar: tarfile.TarFile, member: tarfile.TarInfo, directory: int, name: str) -> None:
        if member.isreg():
            source = tar.extractfile(member)
            assert source is not None
            with os.fdopen(os.open(name, _CREATE, 0o600, dir_fd=directory), "wb", buffering=0) as file:
                while data := source.read(_CHUNK):
                    file.write(data)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=directory)
        elif member.islnk():
            parts = _parts(member.linkname)
            if not parts:
                raise Invalid(f"{shorten(member.name)} links to nothing", "make the archive anew")
            with self._parent(parts) as source_directory:
                os.link(parts[-1], name, src_dir_fd=source_directory, dst_dir_fd=directory, follow_symlinks=False)
        elif member.isfifo():
            os.mkfifo(name, 0o600, dir_fd=directory)
        else:
            raise Invalid(f"{shorten(member.name)} is a device", "leave devices out of the archive")

    def _own(self, member: tarfile.TarInfo, directory: int, name: str) -> None:
        """Owner first: changing it takes set-user-ID bits away (chown(2))."""
        if member.islnk():
            return
        base = self.tree.id_base
        uid, gid = (n if 0 <= n < IDS_PER_TENANT else _NOBODY for n in (member.uid, member.gid))
        os.chown(name, base + uid, base + gid, dir_fd=directory, follow_symlinks=False)
        if member.issym():
            return
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            if not stat.S_ISLNK(os.fstat(fd).st_mode):  # fchmod(2) refuses O_PATH; its magic link can't be swapped
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(member.mode))
        finally:
            os.close(fd)
        os.utime(name, (member.mtime, member.mtime), dir_fd=directory, follow_symlinks=False)


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Invalid(f"{shorten(name)} leads out of the target", "an archive may not have .. in its names")
    return parts


def read(tree: Tree, path: str, source: BinaryIO) -> None:
    """Unpacks a tar into the directory `path`. What stands in the way of a file is replaced.

    NotFound, Invalid, Conflict (read-only), Failed. What was unpacked before an error stays.
    """
    with _errors(path), ExitStack() as stack:
        top = mounts.open_beneath(tree.root, path, flags=os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, top)
        if not tree.allowed(top):
            raise Invalid(f"{shorten(path)} holds no files", "name a directory that is on a disk or tmpfs")
        tar = stack.enter_context(tarfile.open(fileobj=source, mode="r|*", bufsize=_CHUNK))
        reader = _Reader(tree, top)
        for member in tar:
            reader.take(tar, member)
