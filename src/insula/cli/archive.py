"""Tar streams to and from the host's files, for `insula cp`.

The archive comes from an instance, so it is hostile: an entry may be called ``../../etc/shadow``, or a link may
be planted first and written through afterwards. `insula.tree` follows no link and refuses ``..``. Files belong to the
caller, unless owners are kept; set-uid bits are dropped in any case; devices and sockets are left out.
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
    """A file to read from, made of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""
        self._error: InsulaError | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end, and before an error: that is raised by the next call."""
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
        """Whether there is another piece; an error is kept for the next time if it may come `later`."""
        if self._error is None:
            try:
                self._rest = next(self._pieces, b"")
            except InsulaError as error:
                self._error = error
        if self._error is not None and not later:
            raise self._error
        return bool(self._rest)


def pack(source: str, name: str, *, keep: bool = False) -> Iterator[bytes]:
    """A tar, in pieces, of the file or tree at `source`, which is called `name` in it.

    Owned by root, or with `keep` by whom it is owned here. A link is packed as a link; one that ends with a slash is
    the directory that it leads to.
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
    """Unpacks a tar of one tree as cp(1) would: as `name` into `target` if that is a directory, else as `target`.

    Without a `name` what is in the tree goes into the directory `target`, which is made if it isn't there. With `keep`
    files belong to whom the archive says. Returns the number of entries. Invalid, NotFound and Conflict when `target`
    can't be that, and nothing was changed; Failed for a damaged archive.
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
    """What cp(1) refuses: a directory in place of a file, and a file in place of a directory that isn't there."""
    if os.path.isdir(target):
        return
    if os.path.lexists(target.rstrip("/") or "/"):
        if directory or target.endswith("/"):
            raise Conflict(f"{clean(target)} is no directory", "choose another name")
    elif target.endswith("/") and not directory:
        raise NotFound(f"there is no directory {clean(target)}", "make it first")
