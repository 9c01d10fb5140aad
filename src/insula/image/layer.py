"""A layer's tar archive made into a directory as overlayfs wants it.

A layer is a *changeset*: what it adds or changes is in the archive as it is; what it deletes from the layers
below is a *whiteout*, an empty file ``.wh.NAME``; and ``.wh..wh..opq`` makes its directory hide everything
below (image-spec, layer.md). Overlayfs says the same in its own words: a character device 0/0 in the place of
NAME, and the extended attribute ``trusted.overlay.opaque=y`` on the directory
(Documentation/filesystems/overlayfs.rst).

The archive is hostile. Nothing outside of the target may change, whatever it says:

- names are taken apart here; absolute ones and ``..`` are refused, as are overlong and reserved ones;
- each parent directory is opened with openat2(2) RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS, and all work is done
  relative to that descriptor on a single name without following links: a symbolic link planted earlier leads
  nowhere;
- device nodes are refused, hard links must point at what this archive has made, setuid bits and owners are
  kept because layers are only ever seen through an idmapped mount, below a directory that only root may
  enter;
- extended attributes: ``user.*`` and file capabilities of version 2 are kept, the rest is dropped:
  ``trusted.overlay.*`` in particular would let a layer redirect overlayfs into other places;
- bytes and entries are bounded.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from insula.image.tar import (
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    HARD_LINK,
    MAX_PATH,
    REGULAR,
    SYMLINK,
    Entry,
    Reader,
)
from insula.kernel import linux
from insula.model.errors import Failed, Invalid
from insula.model.units import shorten

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
XATTR_OPAQUE = "trusted.overlay.opaque"
MAX_ID = 65535  # a tenant's user namespace has no more
MAX_COMPONENTS = 200
MAX_XATTRS = 64
XATTR_CAPABILITY = b"security.capability"
_VFS_CAP_REVISION_2 = 0x02000000

_RESOLVE = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_XDEV
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Limits(NamedTuple):
    """What one archive may make: `bytes` of file content, and `entries`."""

    bytes: int = 20 << 30
    entries: int = 1_000_000


def extract(reader: Reader, root: int, limits: Limits, *, plain: bool = False) -> int:
    """Extracts the archive below the directory descriptor `root`; the number of entries.

    With `plain` it is an ordinary archive and no layer: whiteouts mean nothing, and owners, modes and attributes are
    not kept. Raises Invalid for what is refused, Failed when the disk is full; the caller removes what was made so far.
    """
    extraction = _Extraction(reader, root, limits, plain)
    try:
        extraction.run()
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed("the disk is full while extracting a layer", "free some space: insula image rm") from e
        raise Failed(f"extracting a layer failed: {e.strerror}", "see the log of insulad") from e
    finally:
        extraction.close()
    return extraction.entries


class _Extraction:
    def __init__(self, reader: Reader, root: int, limits: Limits, plain: bool) -> None:
        self._reader, self._root, self._limits, self._plain = reader, root, limits, plain
        self.entries = 0
        self._bytes = 0
        self._parent: tuple[bytes, int] = (b"", -1)  # the directory opened last: mostly the next entry's, too
        self._times: dict[bytes, int] = {}  # of directories, set at the end because work inside changes them

    def run(self) -> None:
        for entry in self._reader:
            self.entries += 1
            self._bytes += entry.size
            if self.entries > self._limits.entries:
                raise Invalid(f"the archive has more than {self._limits.entries} entries", "this is not allowed here")
            if self._bytes > self._limits.bytes:
                raise Invalid(f"the archive makes more than {self._limits.bytes} bytes", "this is not allowed here")
            parts = split(entry.name)
            if not parts:
                self._directory_itself(entry)
            elif not self._plain and parts[-1].startswith(WHITEOUT):
                self._whiteout(entry, parts)
            else:
                self._make(entry, parts)
        for path, mtime in self._times.items():
            fd = self._open_directory(path)
            try:
                os.utime(fd, ns=(mtime, mtime))
            finally:
                os.close(fd)

    def close(self) -> None:
        if self._parent[1] >= 0:
            os.close(self._parent[1])
        self._parent = (b"", -1)

    # -- entries ---------------------------------------------------------------------------

    def _make(self, entry: Entry, parts: list[bytes]) -> None:
        parent, name = self._open_parent(parts), parts[-1]
        if not self._plain and not (0 <= entry.uid <= MAX_ID and 0 <= entry.gid <= MAX_ID):
            raise Invalid(
                f"{_show(entry.name)} belongs to {entry.uid}:{entry.gid}", f"owners must be from 0 to {MAX_ID}"
            )
        if entry.kind == DIRECTORY:
            self._directory(entry, parent, name)
            self._times[b"/".join(parts)] = entry.mtime_ns
        elif entry.kind == REGULAR:
            self._regular(entry, parent, name)
        elif entry.kind == HARD_LINK:
            self._hard_link(entry, parent, name, parts)
        elif entry.kind == SYMLINK:
            if not entry.link:
                raise Invalid(f"{_show(entry.name)} is a symbolic link to nothing", "the archive is damaged")
            self._clear(parent, name, entry)
            os.symlink(entry.link, name, dir_fd=parent)
            self._own(entry, parent, name)
        elif entry.kind == FIFO and not self._plain:
            self._clear(parent, name, entry)
            os.mkfifo(name, 0o600, dir_fd=parent)
            self._own(entry, parent, name)
            os.chmod(name, entry.mode & 0o777, dir_fd=parent)
        else:
            assert entry.kind in (CHARACTER, BLOCK_DEVICE, FIFO)
            raise Invalid(
                f"{_show(entry.name)} is a device node or pipe, and archives may not have them here",
                "make the archive without it, as with tar --exclude=./dev/*",
            )

    def _regular(self, entry: Entry, parent: int, name: bytes) -> None:
        try:
            fd = os.open(name, _NEW, 0o600, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, name, entry)
            fd = os.open(name, _NEW, 0o600, dir_fd=parent)
        try:
            end = 0
            for offset, chunk in self._reader.data(entry):
                end = offset + len(chunk)
                while chunk:
                    written = os.pwrite(fd, chunk, offset)
                    chunk, offset = chunk[written:], offset + written
            if end < entry.size:
                os.ftruncate(fd, entry.size)
            self._set_metadata(entry, fd)
        finally:
            os.close(fd)

    def _directory(self, entry: Entry, parent: int, name: bytes) -> None:
        opaque = False
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                opaque = _is_whiteout(found)
                os.unlink(name, dir_fd=parent)
                os.mkdir(name, 0o700, dir_fd=parent)
        fd = os.open(name, _DIR, dir_fd=parent)
        try:
            if opaque:  # deleted below and made anew: nothing of the old one may shine through
                os.setxattr(fd, XATTR_OPAQUE, b"y")
            self._set_metadata(entry, fd)
        finally:
            os.close(fd)

    def _directory_itself(self, entry: Entry) -> None:
        """The entry ``./``: the layer's own root."""
        if entry.kind != DIRECTORY:
            raise Invalid(f"{_show(entry.name)} is no name for a file", "the archive is damaged")
        if not self._plain and not (0 <= entry.uid <= MAX_ID and 0 <= entry.gid <= MAX_ID):
            raise Invalid(f"the root belongs to {entry.uid}:{entry.gid}", f"owners must be from 0 to {MAX_ID}")
        fd = self._open_directory(b"")
        try:
            self._set_metadata(entry, fd)
        finally:
            os.close(fd)
        self._times[b""] = entry.mtime_ns

    def _hard_link(self, entry: Entry, parent: int, name: bytes, parts: list[bytes]) -> None:
        target = split(entry.link)
        if target == parts:
            return  # tar writes this when it is given a name twice
        hint = "a hard link's target must come before it in the same layer"
        try:
            source = self._open_directory(b"/".join(target[:-1]))
        except OSError as e:
            raise Invalid(f"{_show(entry.name)} links to {_show(entry.link)}, which is not there", hint) from e
        try:
            found = os.stat(target[-1], dir_fd=source, follow_symlinks=False) if target else None
            if found is None or stat.S_ISDIR(found.st_mode) or _is_whiteout(found):
                raise Invalid(f"{_show(entry.name)} links to {_show(entry.link)}, which is no file", hint)
            self._clear(parent, name, entry)
            os.link(target[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError as e:
            raise Invalid(f"{_show(entry.name)} links to {_show(entry.link)}, which is not there", hint) from e
        finally:
            os.close(source)

    def _whiteout(self, entry: Entry, parts: list[bytes]) -> None:
        parent, name = self._open_parent(parts), parts[-1]
        hidden = name[len(WHITEOUT) :]
        if entry.kind != REGULAR or entry.size:
            raise Invalid(f"{_show(entry.name)} is a whiteout and no empty file", "the layer is damaged")
        if name == OPAQUE:
            fd = self._open_directory(b"/".join(parts[:-1]))
            try:
                os.setxattr(fd, XATTR_OPAQUE, b"y")
            finally:
                os.close(fd)
            return
        if hidden in (b"", b".", b"..") or hidden.startswith(WHITEOUT):
            raise Invalid(f"{_show(entry.name)} is a whiteout of no name", "the layer is damaged")
        try:
            os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)
            os.utime(hidden, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            # what this layer has itself stays; but a directory must hide the one below
            if stat.S_ISDIR(os.stat(hidden, dir_fd=parent, follow_symlinks=False).st_mode):
                fd = os.open(hidden, _DIR, dir_fd=parent)
                try:
                    os.setxattr(fd, XATTR_OPAQUE, b"y")
                finally:
                    os.close(fd)

    # -- helpers ---------------------------------------------------------------------------

    def _clear(self, parent: int, name: bytes, entry: Entry) -> None:
        """Makes room: the last entry of a name wins, but nothing replaces a directory."""
        try:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            raise Invalid(f"{_show(entry.name)} would replace a directory of the same archive", "mend the archive")
        os.unlink(name, dir_fd=parent)

    def _own(self, entry: Entry, parent: int, name: bytes) -> None:
        if not self._plain:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _set_metadata(self, entry: Entry, fd: int) -> None:
        """Owner, then mode (chown(2) clears setuid), attributes (chown clears capabilities), and time."""
        if self._plain:
            return
        os.chown(fd, entry.uid, entry.gid)
        os.chmod(fd, entry.mode)
        if len(entry.xattrs) > MAX_XATTRS:
            raise Invalid(f"{_show(entry.name)} has {len(entry.xattrs)} attributes", f"at most {MAX_XATTRS} are kept")
        for key, value in entry.xattrs.items():
            if key == XATTR_CAPABILITY:
                _check_capability(entry, value)
            elif not key.startswith(b"user.") or key.startswith(b"user.overlay.") or b"\0" in key or len(key) > 255:
                continue
            os.setxattr(fd, key, value)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _open_parent(self, parts: list[bytes]) -> int:
        """A descriptor of the directory that holds the entry, made if the archive didn't mention it."""
        path = b"/".join(parts[:-1])
        if self._parent[1] >= 0 and self._parent[0] == path:
            return self._parent[1]
        try:
            fd = self._open_directory(path)
        except (FileNotFoundError, NotADirectoryError):  # not there, or a whiteout is
            fd = self._make_directories(parts[:-1])
        except OSError as e:
            raise _bad_parent(path, e) from None
        self.close()
        self._parent = (path, fd)
        return fd

    def _open_directory(self, path: bytes) -> int:
        return linux.openat2(self._root, os.fsdecode(path) or ".", os.O_RDONLY | os.O_DIRECTORY, resolve=_RESOLVE)

    def _make_directories(self, parts: list[bytes]) -> int:
        fd = self._open_directory(b"")
        try:
            for part in parts:
                if not self._plain and part.startswith(WHITEOUT):
                    raise Invalid(f"the directory name {_show(part)} is reserved", "mend the archive")
                opaque = self._remove_whiteout(fd, part)
                try:
                    os.mkdir(part, 0o755, dir_fd=fd)
                except FileExistsError:
                    opaque = False
                below = os.open(part, _DIR, dir_fd=fd)
                os.close(fd)
                fd = below
                if opaque:
                    os.setxattr(fd, XATTR_OPAQUE, b"y")
        except OSError as e:
            os.close(fd)
            raise _bad_parent(b"/".join(parts), e) from None
        except Invalid:
            os.close(fd)
            raise
        return fd

    def _remove_whiteout(self, parent: int, name: bytes) -> bool:
        try:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if _is_whiteout(found):
            os.unlink(name, dir_fd=parent)
            return True
        return False


def _bad_parent(path: bytes, e: OSError) -> Exception:
    if e.errno in (errno.ELOOP, errno.ENOTDIR, errno.EXDEV):
        return Invalid(
            f"{_show(path)} in the archive leads through a link or a file", "the archive is hostile or damaged"
        )
    return e


def _show(name: bytes) -> str:
    return shorten(os.fsdecode(name))


def split(name: bytes) -> list[bytes]:
    """The components of a member's name; empty for the root itself. Raises Invalid for what could escape."""
    if name.startswith(b"/"):
        raise Invalid(f"{_show(name)} in the archive is an absolute path", "make the archive with relative names")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise Invalid(f"{_show(name)} in the archive leads upward", "make the archive without '..'")
    if b"\0" in name or len(name) > MAX_PATH or len(parts) > MAX_COMPONENTS or any(len(p) > 255 for p in parts):
        raise Invalid(f"{_show(name)} in the archive is too long or deep a name", "shorten it")
    return parts


def _is_whiteout(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def _check_capability(entry: Entry, value: bytes) -> None:
    """capabilities(7): only revision 2, which means the root of whatever user namespace the layer is mapped into."""
    if len(value) != 20 or int.from_bytes(value[:4], "little") & 0xFF000000 != _VFS_CAP_REVISION_2:
        raise Invalid(f"{_show(entry.name)} has file capabilities of an unknown form", "set them again with setcap")
