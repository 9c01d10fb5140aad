"""Tar streams to and from the host's files, for `insula cp`.

The archive comes from an instance, so it is hostile: an entry may be called ``../../etc/shadow``, or a link may
be planted first and written through afterwards. Unpacking therefore never hands a path of several components to the
kernel: it opens directory by directory with O_NOFOLLOW (openat(2)), so no link is ever followed, and refuses
``..``. Files belong to the caller; set-uid bits are dropped; devices and sockets are left out.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import suppress

from insula.cli.output import clean, warn
from insula.client.http import CHUNK
from insula.model.errors import Failed, Invalid

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class StreamReader(io.RawIOBase):
    """A file to read from, made of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        parts, missing = [], size
        while size < 0 or missing > 0:
            if not self._rest:
                self._rest = next(self._pieces, b"")
                if not self._rest:
                    break
            part = self._rest if size < 0 else self._rest[:missing]
            self._rest = self._rest[len(part) :]
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)


def pack(source: str, name: str) -> Iterator[bytes]:
    """A tar, in pieces, of the file or tree at `source`, which is called `name` in it; owned by root.

    Without a `name` only what is below `source` is in it.
    """
    sink = _Sink()
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as archive:
        for path in _walk(source):
            called = os.path.normpath(os.path.join(name, os.path.relpath(path, source)))
            if called == ".":
                continue
            member = archive.gettarinfo(path, arcname=called)
            if member is None or not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
                continue
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            if member.isreg():
                with open(path, "rb") as file:
                    archive.addfile(member, file)
            else:
                archive.addfile(member)
            yield from sink.take()
    yield from sink.take()


def _walk(source: str) -> Iterator[str]:
    yield source
    if os.path.isdir(source) and not os.path.islink(source):
        for entry in sorted(os.listdir(source)):
            yield from _walk(os.path.join(source, entry))


class _Sink(io.RawIOBase):
    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(data)  # type: ignore[call-overload]
        self._parts.append(part)
        return len(part)

    def take(self) -> Iterator[bytes]:
        parts, self._parts = self._parts, []
        yield from parts


def unpack(stream: StreamReader, target: str, *, merge: bool = False) -> int:
    """Unpacks a tar whose entries all lie under one name, into `target` if that is a directory, else as `target`.

    With `merge` the one name is left out where `target` is a directory. Returns the number of entries. Raises Invalid
    when `target` can't be written, Failed when an entry is not what it should be.
    """
    count = 0
    into_directory = os.path.isdir(target)
    name = [] if merge and into_directory else [os.path.basename(os.path.abspath(target))]
    parent = target if into_directory else os.path.dirname(os.path.abspath(target))
    try:
        root = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as problem:
        raise Invalid(
            f"{clean(parent)} can't be written to: {problem.strerror}", "name an existing directory"
        ) from None
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                count += 1
                parts = _parts(member.name)
                linked = _parts(member.linkname) if member.islnk() else []
                if merge or not into_directory:
                    parts = [*name, *parts[1:]]
                    linked = [*name, *linked[1:]] if linked else []
                if parts:
                    _place(archive, member, root, parts, linked)
    except (tarfile.TarError, EOFError) as problem:
        raise Failed(f"the archive is damaged: {problem}", "try again") from None
    except OSError as problem:
        raise Failed(f"{clean(target)} can't be written: {problem.strerror}", "see what is in the way there") from None
    finally:
        os.close(root)
    return count


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or not parts or "\0" in name:
        raise Failed(f"the archive has an entry {clean(name)!r}, which points elsewhere", "don't trust this instance")
    return parts


def _place(archive: tarfile.TarFile, member: tarfile.TarInfo, root: int, parts: list[str], linked: list[str]) -> None:
    """One entry, below the directory `root`."""
    *directories, name = parts
    parent = _descend(root, directories)
    try:
        if member.isdir():
            _make_directory(name, parent, member.mode)
        elif member.isreg():
            _replace(name, parent)
            source = archive.extractfile(member)
            assert source is not None
            fd = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent
            )
            with os.fdopen(fd, "wb") as file:
                while data := source.read(CHUNK):
                    file.write(data)
                os.fchmod(fd, member.mode & 0o777)
            os.utime(name, (member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)
        elif member.issym():
            _replace(name, parent)
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.islnk():
            _replace(name, parent)
            *above, old = linked
            origin = _descend(root, above)
            try:
                os.link(old, name, src_dir_fd=origin, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(origin)
        else:
            warn(f"left out {'/'.join(parts)}: neither file, directory nor link")
    finally:
        os.close(parent)


def _descend(root: int, directories: list[str]) -> int:
    """An open directory below `root`, never through a link; made where it is missing."""
    fd = os.dup(root)
    for name in directories:
        try:
            _make_directory(name, fd, 0o755, keep=True)
            deeper = os.open(name, _DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = deeper
    return fd


def _make_directory(name: str, parent: int, mode: int, *, keep: bool = False) -> None:
    """A directory; one that exists stays, and gets `mode` unless `keep`."""
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        if keep or not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            return
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        os.fchmod(fd, (mode & 0o777) | 0o700)
    finally:
        os.close(fd)


def _replace(name: str, parent: int) -> None:
    """Makes way for a file: what has its name goes, unless it is a directory."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)
