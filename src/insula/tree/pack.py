"""Pack a file or tree as a tar stream."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator

from insula.model.errors import Failed
from insula.model.units import shorten
from insula.tree import sparse
from insula.tree.failures import naming

CHUNK = 1 << 18
MAX_PATH = 1 << 16
"""The longest name in the archive: each entry has its whole path, so size grows with the square of the depth."""

_BLOCK = 512
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def _theirs(found: os.stat_result) -> tuple[int, int]:
    return found.st_uid, found.st_gid


class Packer:
    """A packer. `owner` returns the owner of a file in the archive. `allowed` is called for every opened file and
    directory; a refused file is left out, and a refused directory is empty. Devices and sockets are left out, and FIFOs
    unless `fifos`."""

    def __init__(
        self,
        *,
        owner: Callable[[os.stat_result], tuple[int, int]] = _theirs,
        allowed: Callable[[int], bool] = lambda fd: True,
        fifos: bool = False,
    ) -> None:
        self.owner, self.allowed, self.fifos = owner, allowed, fifos
        self.between = True
        """Whether the data so far ends with a complete entry."""
        self._seen: dict[tuple[int, int], str] = {}  # files with several names, by device and inode

    def pack(self, directory: int, name: str, shown: str) -> Iterator[bytes]:
        """Yield the entry `name` of an open directory, with the name `shown` in the archive, and everything below it.

        With "." as `shown`, the entries below have no common directory. Files that are removed meanwhile are left out.
        Failed has the name of an entry that can't be read.
        """
        walk = _Walk(directory, name, shown)
        try:
            while (entry := walk.next()) is not None:
                name, shown = entry
                with naming(shown):
                    try:
                        found = os.stat(name, dir_fd=walk.here, follow_symlinks=False)
                        opened = self._open(walk.here, name, found.st_mode)
                    except FileNotFoundError:  # removed meanwhile
                        continue
                    try:
                        yield from self._entry(walk.here, name, shown, found, opened)
                        if stat.S_ISDIR(found.st_mode) and self.allowed(opened):
                            walk.descend(opened, shown)
                            opened = -1
                    finally:
                        if opened >= 0:
                            os.close(opened)
        finally:
            os.close(walk.here)
        yield bytes(2 * _BLOCK)

    def _open(self, directory: int, name: str, mode: int) -> int:
        """Open a file that is to be read; -1 for one that is left out."""
        if stat.S_ISDIR(mode):
            return os.open(name, _DIRECTORY, dir_fd=directory)
        return os.open(name, _READ, dir_fd=directory) if stat.S_ISREG(mode) else -1

    def _entry(self, directory: int, name: str, shown: str, found: os.stat_result, opened: int) -> Iterator[bytes]:
        if opened >= 0:
            now = os.fstat(opened)  # the name may refer to another file now
            if stat.S_IFMT(now.st_mode) != stat.S_IFMT(found.st_mode):
                return
            found = now
        info = self._info(found, shown)
        if stat.S_ISREG(found.st_mode):
            if self.allowed(opened):
                yield from self._file(opened, info, found)
            return
        if stat.S_ISDIR(found.st_mode):
            info.type = tarfile.DIRTYPE
        elif stat.S_ISLNK(found.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=directory)
        elif stat.S_ISFIFO(found.st_mode) and self.fifos:
            info.type = tarfile.FIFOTYPE
        else:  # devices and sockets have no use elsewhere
            return
        yield _header(info)

    def _info(self, found: os.stat_result, shown: str) -> tarfile.TarInfo:
        if len(shown) > MAX_PATH:
            raise Failed(f"{shorten(shown)} is too deep in directories", f"copy what has paths of less than {MAX_PATH}")
        info = tarfile.TarInfo(shown)
        info.mode, info.mtime = stat.S_IMODE(found.st_mode), int(found.st_mtime)
        info.uid, info.gid = self.owner(found)
        return info

    def _file(self, fd: int, info: tarfile.TarInfo, found: os.stat_result) -> Iterator[bytes]:
        link = (found.st_dev, found.st_ino)
        if found.st_nlink > 1 and link in self._seen:
            info.type, info.linkname = tarfile.LNKTYPE, self._seen[link]
            yield _header(info)
            return
        data = whole = [(0, found.st_size)]
        if found.st_blocks * _BLOCK < found.st_size:
            try:
                data = sparse.pieces(fd, found.st_size)
            except sparse.TooManyPieces:
                what = f"{shorten(info.name, 200)} has more than {sparse.MAX_PIECES} pieces between holes"
                raise Failed(what, "make a copy without: `cp --sparse=never`") from None
        if data == whole:
            info.size = found.st_size
            yield _header(info)
        else:
            yield sparse.header(info, found.st_size, data)
        self.between = False
        for offset, length in data:
            yield from _exactly(fd, offset, length)
        self.between = True
        yield bytes(-sum(length for _, length in data) % _BLOCK)
        if found.st_nlink > 1:
            self._seen[link] = info.name


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _exactly(fd: int, offset: int, length: int) -> Iterator[bytes]:
    """Yield exactly this many bytes, as the header says; zeros if the file has become shorter."""
    end = offset + length
    while offset < end:
        data = os.pread(fd, min(CHUNK, end - offset), offset) or bytes(min(CHUNK, end - offset))
        yield data
        offset += len(data)


class _Walk:
    """A position in a tree: the directory `here` is open, and those above it are recorded by device and inode."""

    def __init__(self, directory: int, name: str, shown: str) -> None:
        self.here = os.dup(directory)
        self._names, self._prefix = [name], ""
        self._first = shown
        self._above: list[tuple[list[str], str, tuple[int, int]]] = []

    def next(self) -> tuple[str, str] | None:
        """Return the next name in `here`, and its name in the archive; None after the last."""
        while not self._names:
            if len(self._above) < 2:  # above the first there is nothing left to do
                return None
            self._ascend()
        name = self._names.pop()
        return name, self._prefix + name if self._above else self._first

    def descend(self, fd: int, shown: str) -> None:
        """Continue in the directory `fd`, which is closed later."""
        names = sorted(os.listdir(fd), reverse=True)
        here = os.fstat(self.here)
        self._above.append((self._names, self._prefix, (here.st_dev, here.st_ino)))
        self._names, self._prefix = names, "" if shown == "." else f"{shown}/"
        os.close(self.here)
        self.here = fd

    def _ascend(self) -> None:
        names, prefix, identity = self._above.pop()
        fd = os.open("..", _DIRECTORY, dir_fd=self.here)
        os.close(self.here)
        self.here = fd
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != identity:
            raise Failed(f"{shorten(self._prefix)} was moved while it was copied", "try again")
        self._names, self._prefix = names, prefix
