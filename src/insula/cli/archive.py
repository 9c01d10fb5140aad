"""Tar streams to and from the host's files, for `insula cp`.

The archive comes from an instance, so it is hostile: it may have an entry ``../../etc/shadow``, or a link and then an
entry below that link. `insula.tree` follows no link and refuses ``..``. Files belong to the caller, unless owners are
kept; set-uid bits are always dropped; devices and sockets are left out.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator

from insula.cli.output import clean, warn
from insula.model.errors import Conflict, Failed, InsulaError, Invalid, NotFound
from insula.tree.pack import Packer
from insula.tree.unpack import Rules
from insula.tree.unpack import unpack as unpack_below

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class StreamReader(io.RawIOBase):
    """A readable file made of an iterator of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""
        self._error: InsulaError | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, fewer only at the end and before an error, which the next call raises."""
        parts: list[bytes] = []
        missing = size
        while size < 0 or missing > 0:
            if not self._rest and not self._next(bool(parts)):
                break
            part = self._rest if size < 0 else self._rest[:missing]
            self._rest = self._rest[len(part) :]
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _next(self, later: bool) -> bool:
        """Read another piece, and return whether there was one; with `later` an error is kept for the next call."""
        if self._error is None:
            try:
                self._rest = next(self._pieces, b"")
            except InsulaError as error:
                self._error = error
        if self._error is not None and not later:
            raise self._error
        return bool(self._rest)


def pack(source: str, name: str, *, keep: bool = False) -> Iterator[bytes]:
    """Yield a tar, in pieces, of the file or tree at `source`, with the name `name` in it.

    The owner is root, or with `keep` that of each file. A link is packed as a link; with a slash at the end of `source`
    the directory that it leads to is packed.
    """
    parent, last = os.path.split(source.rstrip("/"))
    if source.endswith("/") or last in ("", ".", ".."):
        parent, last = source, "."
    packer = Packer() if keep else Packer(owner=lambda found: (0, 0))
    try:
        directory = os.open(parent or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as problem:
        raise Invalid(f"{clean(source)} can't be read: {problem.strerror}", "name a file or directory") from None
    try:
        yield from packer.pack(directory, last, name)
    finally:
        os.close(directory)


def unpack(stream: StreamReader, target: str, name: str, *, keep: bool = False) -> int:
    """Unpack a tar of one tree as cp(1) would: as `name` into `target` if that is a directory, else as `target`.

    Without a `name` the tree's content is put into the directory `target`, which is made if it is missing. With `keep`
    files get the owners of the archive. Returns the number of entries. Invalid, NotFound and Conflict if `target` has
    the wrong kind, with nothing changed; Failed for a damaged archive.
    """
    if os.path.isdir(target):
        where, instead = target, [name] if name else []
    else:
        where, last = os.path.split(os.path.abspath(target))
        instead = [last]
    try:
        root = os.open(where, _DIRECTORY)
    except OSError as problem:
        raise Invalid(f"{clean(where)} can't be written to: {problem.strerror}", "name an existing directory") from None
    rules = Rules(
        where,
        owner=lambda member: (member.uid, member.gid) if keep else None,
        directory_mode=0o700,
        leave_out=lambda shown: warn(f"left out {shown}: neither file, directory nor link"),
    )
    try:
        return unpack_below(
            stream,
            root,
            rules,
            instead=instead,
            first=lambda member: _check_target(target, member.isdir()),
        )
    except (tarfile.TarError, EOFError) as problem:
        raise Failed(f"the archive is damaged: {problem}", "try again") from None
    finally:
        os.close(root)


def _check_target(target: str, directory: bool) -> None:
    """Refuse what cp(1) refuses: a directory in place of a file, and a file in place of a missing directory."""
    if os.path.isdir(target):
        return
    if os.path.lexists(target.rstrip("/") or "/"):
        if directory or target.endswith("/"):
            raise Conflict(f"{clean(target)} is no directory", "choose another name")
    elif target.endswith("/") and not directory:
        raise NotFound(f"there is no directory {clean(target)}", "make it first")
