"""Unpack a tar stream below an open directory.

A file is written under another name and renamed when it is complete (rename(2)): an existing file stays until then, and
an interrupted copy leaves nothing. As with cp(1), a directory never replaces something else, nor the other way round.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from insula.model.errors import Conflict, Invalid
from insula.model.units import shorten
from insula.tree import sparse
from insula.tree.failures import naming, why

CHUNK = 1 << 18

_AT = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK = 512
_SPECIAL = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


class Readable(Protocol):
    """The source of an archive."""

    def read(self, size: int, /) -> bytes: ...


class Rules:
    """Rules for new files. `where` is the directory's name in messages.

    `owner` returns the owner of an entry (None: the user of this process). `mode` are the bits of its mode that are
    kept, and `directory_mode` those that a directory always has. `allowed` is called for every opened directory.
    `leave_out` is called for devices, and without `fifos` for FIFOs.
    """

    def __init__(
        self,
        where: str,
        *,
        owner: Callable[[tarfile.TarInfo], tuple[int, int] | None] = lambda member: None,
        mode: int = 0o777,
        directory_mode: int = 0,
        allowed: Callable[[int], bool] = lambda fd: True,
        fifos: bool = False,
        leave_out: Callable[[str], None],
    ) -> None:
        self.where, self.owner, self.mode, self.directory_mode = where, owner, mode, directory_mode
        self.allowed, self.fifos, self.leave_out = allowed, fifos, leave_out


def unpack(
    source: Readable,
    root: int,
    rules: Rules,
    *,
    form: str = "r|",
    instead: list[str] | None = None,
    first: Callable[[tarfile.TarInfo], None] = lambda member: None,
) -> int:
    """Unpack the archive `source` into the open directory `root`; returns the number of entries.

    With `instead` all entries must be below the first one, whose name is replaced by these components (none: its
    content is put into `root` itself). `first` is called with the first entry before anything is done, and may raise.
    `form` is the mode for `tarfile.open`. TarError if it is not an archive; Conflict, Invalid and Failed have the name
    of the entry. If the archive ends with an error, that is raised.
    """
    count = 0
    tar: Any  # its stream is not in the annotations
    with tarfile.open(fileobj=source, mode=form, bufsize=CHUNK, errorlevel=2) as tar:  # type: ignore[call-overload]
        made = _Maker(tar.fileobj, root, rules)
        try:
            while (member := _next(tar)) is not None:
                if not count:
                    first(member)
                    made.instead, made.top = instead, _parts(member.name)
                count += 1
                made.make(member)
            if tar.fileobj.tell() < tar.offset + _BLOCK:  # tarfile accepts any end
                raise tarfile.ReadError("it ends too early")
        except Exception:
            if (error := why(tar.pax_headers)) is not None:
                raise error from None
            raise
        finally:
            made.close()
    return count


def _next(tar: Any) -> tarfile.TarInfo | None:
    """Return the next entry; TarError for any error in it."""
    try:
        member: tarfile.TarInfo | None = tar.next()
        if member is not None:
            sparse.repair(member, tar)
    except (ValueError, IndexError, EOFError, OverflowError) as error:  # tarfile lets these pass
        raise tarfile.ReadError(f"a header is malformed ({error})") from None
    tar.members = []  # otherwise it keeps all of them in memory
    return member


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise Invalid(f"{shorten(name)} leads out of the target", "an archive may not have .. in its names")
    return parts


def mount_number(fd: int) -> int:
    """Return the ID of the mount in which the file behind `fd` was opened (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return int(next(line.split()[1] for line in file if line.startswith("mnt_id:")))


def _mounted(directory: int, name: str) -> int:
    """Open and truncate a file that is mounted on that name, such as /etc/hosts of an instance; -1 if none is.

    It can't be replaced without losing the mount, so it is written in place, and keeps its owner and mode.
    """
    try:
        fd = os.open(name, _AT, dir_fd=directory)
    except FileNotFoundError:
        return -1
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or mount_number(fd) == mount_number(directory):
            return -1
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(fd)


class _Maker:
    def __init__(self, stream: Any, root: int, rules: Rules) -> None:
        self.stream, self.root, self.rules = stream, root, rules
        self.instead: list[str] | None = None
        self.top: list[str] = []
        self._at, self._path = os.dup(root), list[str]()  # the directory of the last entry, and where it is

    def close(self) -> None:
        os.close(self._at)

    def make(self, member: tarfile.TarInfo) -> None:
        """Make the file of an entry."""
        parts = self._place(member.name)
        if not parts:
            return  # the target itself
        shown = os.path.join(self.rules.where, *parts)
        with naming(shown):
            name = parts[-1]
            if member.type in _SPECIAL and not (member.isfifo() and self.rules.fifos):
                self.rules.leave_out(shown)
            elif member.isdir():
                self._directory(member, self._parent(parts), name, shown)
            elif member.isreg():
                self._file(member, self._parent(parts), name, shown)
            elif member.issym():
                self._replace(self._parent(parts), name, shown, lambda at, new: self._link(member, at, new))
            elif member.islnk():
                self._hard_link(member, parts, shown)
            elif member.isfifo():
                self._replace(self._parent(parts), name, shown, lambda at, new: self._fifo(member, at, new))
            else:
                raise Invalid(f"{shorten(shown, 200)} is of an unknown kind", "make the archive again, with tar")

    def _place(self, name: str) -> list[str]:
        """Return the components of an entry's name below the root."""
        parts = _parts(name)
        if self.instead is None:
            return parts
        if parts[: len(self.top)] != self.top:
            raise Invalid(f"{shorten(name)} is not below {shorten('/'.join(self.top))}", "send one tree")
        return self.instead + parts[len(self.top) :]

    # -- directories -----------------------------------------------------------------------------------------------

    def _parent(self, parts: list[str]) -> int:
        """Open the parent directory of an entry, creating missing ones; it is closed by the next call."""
        if parts[:-1][: len(self._path)] != self._path:
            self._enter(os.dup(self.root), [])
        for part in parts[len(self._path) : -1]:
            path = [*self._path, part]
            try:
                below = os.open(part, _AT, dir_fd=self._at)
            except FileNotFoundError:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=self._at)
                below = os.open(part, _AT, dir_fd=self._at)
            self._enter(below, path)
            if not stat.S_ISDIR(os.fstat(below).st_mode):
                self._enter(os.dup(self.root), [])
                raise Conflict(
                    f"{self._shown(path)} is no directory", "links are not followed below the target; choose another"
                )
            self._check(below, path)
        return self._at

    def _enter(self, fd: int, path: list[str]) -> None:
        os.close(self._at)
        self._at, self._path = fd, path

    def _check(self, fd: int, path: list[str]) -> None:
        if not self.rules.allowed(fd):
            raise Invalid(f"{self._shown(path)} holds no files", "choose a place on a disk or tmpfs")

    def _shown(self, path: list[str]) -> str:
        return shorten(os.path.join(self.rules.where, *path), 200)

    def _directory(self, member: tarfile.TarInfo, at: int, name: str, shown: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=at)
        fd = os.open(name, _AT, dir_fd=at)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                raise Conflict(
                    f"{shorten(shown, 200)} is a directory in the archive, but not here", "move it out of the way"
                )
            if not self.rules.allowed(fd):  # something is mounted on it
                raise Invalid(f"{shorten(shown, 200)} holds no files", "choose a place on a disk or tmpfs")
            self._attributes(member, fd, self.rules.directory_mode)
        finally:
            os.close(fd)

    # -- files -----------------------------------------------------------------------------------------------------

    def _replace(self, at: int, name: str, shown: str, make: Callable[[int, str], None]) -> None:
        """Make a file in the open directory `at` with `make` under another name, and rename it when it is complete."""
        try:
            there = os.stat(name, dir_fd=at, follow_symlinks=False).st_mode
        except FileNotFoundError:
            there = 0
        if stat.S_ISDIR(there):
            raise Conflict(
                f"{shorten(shown, 200)} is a directory here, but not in the archive", "move it out of the way"
            )
        if stat.S_ISCHR(there) or stat.S_ISBLK(there):
            raise Conflict(f"{shorten(shown, 200)} is a device", "choose another name")
        new = f".insula-{os.urandom(8).hex()}"
        try:
            make(at, new)
            os.rename(new, name, src_dir_fd=at, dst_dir_fd=at)
        finally:
            with suppress(FileNotFoundError):  # it has its name; of two names of one file rename(2) leaves both
                os.unlink(new, dir_fd=at)

    def _file(self, member: tarfile.TarInfo, at: int, name: str, shown: str) -> None:
        if (mounted := _mounted(at, name)) >= 0:
            try:
                self._fill(member, mounted)
            finally:
                os.close(mounted)
            return

        def make(at: int, new: str) -> None:
            fd = os.open(new, _CREATE, 0o600, dir_fd=at)
            try:
                self._fill(member, fd)
                self._attributes(member, fd)
                os.utime(fd, (member.mtime, member.mtime))
            finally:
                os.close(fd)

        self._replace(at, name, shown, make)

    def _fill(self, member: tarfile.TarInfo, fd: int) -> None:
        """Write the entry's data into an empty file."""
        self.stream.seek(member.offset_data)
        for offset, length in sparse.stored(member):
            self._copy(fd, offset, length)
        if member.issparse():
            os.ftruncate(fd, member.size)

    def _copy(self, fd: int, offset: int, length: int) -> None:
        while length:
            data = self.stream.read(min(length, CHUNK))
            if not data:
                raise tarfile.ReadError("unexpected end of data")
            length -= len(data)
            view = memoryview(data)
            while view:
                written = os.pwrite(fd, view, offset)
                offset, view = offset + written, view[written:]

    def _link(self, member: tarfile.TarInfo, at: int, new: str) -> None:
        os.symlink(member.linkname, new, dir_fd=at)
        if self.rules.owner(member) is not None:
            fd = os.open(new, _AT, dir_fd=at)
            try:
                if stat.S_ISLNK(os.fstat(fd).st_mode):
                    self._own(member, fd)
            finally:
                os.close(fd)

    def _fifo(self, member: tarfile.TarInfo, at: int, new: str) -> None:
        os.mkfifo(new, 0o600, dir_fd=at)
        fd = os.open(new, _AT, dir_fd=at)
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                self._attributes(member, fd)
        finally:
            os.close(fd)

    def _hard_link(self, member: tarfile.TarInfo, parts: list[str], shown: str) -> None:
        other = self._place(member.linkname)
        if not other:
            raise Invalid(f"{shorten(shown, 200)} links to nothing", "make the archive again")
        source = os.dup(self._parent(other))
        try:

            def link(at: int, new: str) -> None:
                os.link(other[-1], new, src_dir_fd=source, dst_dir_fd=at, follow_symlinks=False)

            self._replace(self._parent(parts), parts[-1], shown, link)
        finally:
            os.close(source)

    # -- owner and mode ----------------------------------------------------------------------------------------------

    def _own(self, member: tarfile.TarInfo, fd: int) -> None:
        """Set the owner through the descriptor's link in /proc, which leads to the file even if it was renamed."""
        if (owner := self.rules.owner(member)) is not None:
            os.chown(f"/proc/self/fd/{fd}", *owner)

    def _attributes(self, member: tarfile.TarInfo, fd: int, besides: int = 0) -> None:
        """Set owner and mode; the owner first, because changing it clears set-user-ID bits (chown(2))."""
        self._own(member, fd)
        os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(member.mode) & self.rules.mode | besides)
