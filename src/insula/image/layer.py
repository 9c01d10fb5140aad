"""Extract a layer's tar archive into a directory for overlayfs.

A layer is a *changeset* (image-spec, layer.md). Added and changed files are in the archive as they are. A deleted file
of the layers below is a *whiteout*, an empty file ``.wh.NAME``. A file ``.wh..wh..opq`` makes its directory *opaque*:
it hides the directories below. Overlayfs has a character device 0/0 named NAME for a whiteout, and the extended
attribute ``trusted.overlay.opaque=y`` for an opaque directory (Documentation/filesystems/overlayfs.rst).

The archive is hostile, and must not be able to change anything outside of the target:

- Names are split here. A leading ``/`` is dropped, as tar(1) does; ``..``, overlong and reserved names are refused.
- Each parent directory is opened with openat2(2) RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS. All operations are relative to
  that descriptor, with a single name and without following links, so symbolic links of the archive have no effect.
- Device nodes are left out, with a note. A hard link whose target isn't in the archive becomes a symbolic link, with a
  note: the target may be in a lower layer, and layers are shared by images, so it is unknown which.
- Set-ID bits and owners are kept, because layers are used only through idmapped mounts, and their directory can be
  entered only by root.
- The extended attributes ``user.*`` and file capabilities of version 2 are kept, others are dropped. With
  ``trusted.overlay.*`` a layer could redirect overlayfs to other directories.
- The numbers of bytes and entries are limited.

Setting ``trusted.*`` needs CAP_SYS_ADMIN, which the process that reads the archive doesn't have. So `extract` only
returns the opaque directories, and `set_opaque` marks them afterwards.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from insula.image.limits import ExtractionLimits, check_room
from insula.image.tar import (
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    HARD_LINK,
    MAX_PATH,
    REGULAR,
    SYMLINK,
    Member,
    Reader,
)
from insula.kernel import syscalls
from insula.model.errors import Failed, Invalid
from insula.model.units import shorten

WHITEOUT = b".wh."
AUFS = b".wh..wh."  # internal names of aufs in old images: hard link targets in .wh..wh.plnk, and nothing useful
AUFS_LINKS = b".wh..wh.plnk"
OPAQUE = b".wh..wh..opq"
XATTR_OPAQUE = "trusted.overlay.opaque"
MAX_ID = 65535  # the size of a tenant's user namespace
MAX_COMPONENTS = 200
MAX_XATTRS = 64
MAX_OPAQUE = 16 << 20  # bytes of the paths of opaque directories
XATTR_CAPABILITY = b"security.capability"
_VFS_CAP_REVISION_2 = 0x02000000

_RESOLVE = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_OF_THE_HOST = {errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPERM, errno.EACCES}
_ROOM_EVERY = 256  # entries and chunks of data between two checks of the free space
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Extracted(NamedTuple):
    """The result of `extract`: numbers of entries and bytes, paths of opaque directories, and notes on what was left
    out."""

    entries: int
    bytes: int
    opaque: list[str]
    notes: list[str]


def extract(reader: Reader, root: int, limits: ExtractionLimits, *, plain: bool = False) -> Extracted:
    """Extract the archive below the directory descriptor `root`; call `set_opaque` with the result.

    With `plain` it is an ordinary archive: whiteouts are ordinary files, and owners, modes and attributes are not kept.
    Invalid if the archive is refused, Failed if the disk is full; the caller removes the partial result.
    """
    extraction = _Extraction(reader, root, limits, plain)
    try:
        extraction.run()
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed("the disk is full while extracting a layer", "free some space: insula image rm") from e
        if e.errno in _OF_THE_HOST:
            raise Failed(f"extracting a layer failed: {e.strerror}", "see the log of insulad") from e
        what = f"{_show(extraction.name)} in the archive can't be made: {e.strerror}"
        raise Invalid(what, "the image is damaged") from e
    finally:
        extraction.close()
    opaque = [os.fsdecode(path) for path in extraction.opaque]
    return Extracted(extraction.entries, extraction.bytes, opaque, extraction.notes())


def set_opaque(root: int, paths: Iterable[str]) -> None:
    """Mark directories below the descriptor `root` as opaque. Missing ones are ignored."""
    for path in paths:
        try:
            fd = syscalls.openat2(root, path or ".", os.O_RDONLY | os.O_DIRECTORY, resolve=_RESOLVE)
        except OSError as e:
            if e.errno in _GONE:
                continue
            raise
        try:
            os.setxattr(fd, XATTR_OPAQUE, b"y")
        finally:
            os.close(fd)


class _Extraction:
    def __init__(self, reader: Reader, root: int, limits: ExtractionLimits, plain: bool) -> None:
        self._reader, self._root, self._limits, self._plain = reader, root, limits, plain
        self.name = b""  # of the current entry
        self.entries = self.bytes = self._steps = 0
        self.opaque: dict[bytes, None] = {}  # opaque directories, in order
        self._nodes: dict[bytes, None] = {}  # device nodes and hard links to them, which are left out
        self._below: dict[bytes, None] = {}  # hard links that were made symbolic links
        self._parent: tuple[bytes, int] = (b"", -1)  # the last opened directory, which mostly is that of the next entry
        self._times: dict[bytes, int] = {}  # of directories; set at the end, because later entries change them

    def run(self) -> None:
        for entry in self._reader:
            self.name = entry.name
            self.entries += 1
            self.bytes += entry.size
            self._check_room()
            if self.entries > self._limits.entries:
                raise Invalid(f"the archive has more than {self._limits.entries} entries", "this is not allowed here")
            if self.bytes > self._limits.bytes:
                raise Invalid(f"the archive makes more than {self._limits.bytes} bytes", "this is not allowed here")
            parts = split(entry.name)
            if not parts:
                self._directory_itself(entry)
            elif not self._plain and _is_aufs(parts):
                if parts[0] == AUFS_LINKS and entry.kind == (DIRECTORY if len(parts) == 1 else REGULAR):
                    self._make(entry, parts)
            elif not self._plain and parts[-1].startswith(WHITEOUT):
                self._whiteout(entry, parts)
            else:
                self._make(entry, parts)
        if not self._plain:
            with suppress(FileNotFoundError):
                shutil.rmtree(AUFS_LINKS, dir_fd=self._root)
        if sum(map(len, self.opaque)) > MAX_OPAQUE:
            raise Invalid("the layer hides too many directories of the layers below", "this is not allowed here")
        for path, mtime in self._times.items():
            try:
                fd = self._open_directory(path)
            except OSError as e:
                if e.errno in _GONE:  # replaced by a file
                    continue
                raise
            try:
                os.utime(fd, ns=(mtime, mtime))
            finally:
                os.close(fd)

    def notes(self) -> list[str]:
        """Return notes on what was left out, one line each."""
        notes = []
        if self._nodes:
            notes.append(f"device node {_first(self._nodes)} left out: instances have their own devices")
        if self._below:
            notes.append(f"hard link {_first(self._below)} into a lower layer made a symbolic link")
        return notes

    def _check_room(self) -> None:
        self._steps += 1
        if self._steps % _ROOM_EVERY == 0:
            check_room(self._root, "extracting a layer")

    def close(self) -> None:
        if self._parent[1] >= 0:
            os.close(self._parent[1])
        self._parent = (b"", -1)

    # -- entries ---------------------------------------------------------------------------

    def _make(self, entry: Member, parts: list[bytes]) -> None:
        parent, name = self._open_parent(parts), parts[-1]
        if not self._plain and not (0 <= entry.uid <= MAX_ID and 0 <= entry.gid <= MAX_ID):
            raise Invalid(
                f"{_show(entry.name)} belongs to {entry.uid}:{entry.gid}", f"owners must be from 0 to {MAX_ID}"
            )
        if entry.kind == DIRECTORY:
            self._directory(entry, parent, name, parts)
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
        elif self._plain:
            raise Invalid(f"{_show(entry.name)} is a device node or pipe", "this is not the archive of an image")
        else:
            assert entry.kind in (CHARACTER, BLOCK_DEVICE)
            self._nodes[b"/".join(parts)] = None

    def _regular(self, entry: Member, parent: int, name: bytes) -> None:
        try:
            fd = os.open(name, _NEW, 0o600, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, name, entry)
            fd = os.open(name, _NEW, 0o600, dir_fd=parent)
        try:
            end = 0
            for offset, chunk in self._reader.data(entry):
                self._check_room()
                end = offset + len(chunk)
                while chunk:
                    written = os.pwrite(fd, chunk, offset)
                    chunk, offset = chunk[written:], offset + written
            if end < entry.size:
                os.ftruncate(fd, entry.size)
            self._set_metadata(entry, fd)
        finally:
            os.close(fd)

    def _directory(self, entry: Member, parent: int, name: bytes, parts: list[bytes]) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                if _is_whiteout(found):  # a whiteout before it: the directory below must not be merged
                    self.opaque[b"/".join(parts)] = None
                os.unlink(name, dir_fd=parent)
                os.mkdir(name, 0o700, dir_fd=parent)
        fd = os.open(name, _DIR, dir_fd=parent)
        try:
            self._set_metadata(entry, fd)
        finally:
            os.close(fd)

    def _directory_itself(self, entry: Member) -> None:
        """Apply the entry ``./``, the layer's root directory."""
        if entry.kind != DIRECTORY:
            raise Invalid(f"{_show(entry.name)} is not a name for a file", "the archive is damaged")
        if not self._plain and not (0 <= entry.uid <= MAX_ID and 0 <= entry.gid <= MAX_ID):
            raise Invalid(f"the root belongs to {entry.uid}:{entry.gid}", f"owners must be from 0 to {MAX_ID}")
        fd = self._open_directory(b"")
        try:
            self._set_metadata(entry, fd)
        finally:
            os.close(fd)
        self._times[b""] = entry.mtime_ns

    def _hard_link(self, entry: Member, parent: int, name: bytes, parts: list[bytes]) -> None:
        target = split(entry.link)
        if target == parts:
            return  # tar writes this if a name was given twice
        if b"/".join(target) in self._nodes:
            self._nodes[b"/".join(parts)] = None
            return
        hint = "a hard link's target must come before it in the same layer"
        try:
            source = self._open_directory(b"/".join(target[:-1]))
        except FileNotFoundError:
            self._link_below(entry, parent, name, parts, target)
            return
        except OSError as e:
            raise Invalid(f"{_show(entry.name)} links to {_show(entry.link)}, which does not exist", hint) from e
        try:
            found = os.stat(target[-1], dir_fd=source, follow_symlinks=False) if target else None
            if found is None or stat.S_ISDIR(found.st_mode) or _is_whiteout(found):
                raise Invalid(f"{_show(entry.name)} links to {_show(entry.link)}, which is not a file", hint)
            self._clear(parent, name, entry)
            os.link(target[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            self._link_below(entry, parent, name, parts, target)
        finally:
            os.close(source)

    def _link_below(self, entry: Member, parent: int, name: bytes, parts: list[bytes], target: list[bytes]) -> None:
        """Make a symbolic link instead of a hard link whose target is not in this layer."""
        if self._plain:
            hint = "a hard link's target must come before it in the same archive"
            raise Invalid(f"{_show(entry.name)} links to {_show(entry.link)}, which does not exist", hint)
        self._clear(parent, name, entry)
        os.symlink(b"/" + b"/".join(target), name, dir_fd=parent)
        self._own(entry, parent, name)
        self._below[b"/".join(parts)] = None

    def _whiteout(self, entry: Member, parts: list[bytes]) -> None:
        parent, name = self._open_parent(parts), parts[-1]
        hidden = name[len(WHITEOUT) :]
        if entry.kind != REGULAR or entry.size:
            raise Invalid(f"{_show(entry.name)} is a whiteout, but not an empty file", "the layer is damaged")
        if name == OPAQUE:
            self.opaque[b"/".join(parts[:-1])] = None
            return
        if hidden in (b"", b".", b".."):
            raise Invalid(f"{_show(entry.name)} is a whiteout without a name", "the layer is damaged")
        try:
            os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)
            os.utime(hidden, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            # an entry of this layer itself stays; a directory becomes opaque
            if stat.S_ISDIR(os.stat(hidden, dir_fd=parent, follow_symlinks=False).st_mode):
                self.opaque[b"/".join([*parts[:-1], hidden])] = None

    # -- helpers ---------------------------------------------------------------------------

    def _clear(self, parent: int, name: bytes, entry: Member) -> None:
        """Remove an earlier entry of that name, also a directory with its content: the last entry wins."""
        try:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(name, dir_fd=parent)  # no deeper than MAX_COMPONENTS
        else:
            os.unlink(name, dir_fd=parent)

    def _own(self, entry: Member, parent: int, name: bytes) -> None:
        if not self._plain:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _set_metadata(self, entry: Member, fd: int) -> None:
        """Set owner, then mode (chown(2) clears set-ID bits), attributes (chown clears capabilities), and time."""
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
            try:
                os.setxattr(fd, key, value)
            except OSError as e:  # ext4 fails with ENOSPC if they don't fit into a block
                if e.errno not in (errno.ENOSPC, errno.E2BIG, errno.ERANGE):
                    raise
                check_room(fd, "extracting a layer")
                what = f"attribute {_show(key)} of {_show(entry.name)} has {len(value)} bytes"
                raise Invalid(what, "this is more than the host's file system supports") from None
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _open_parent(self, parts: list[bytes]) -> int:
        """Open the parent directory of the entry, creating it if the archive has no entry for it."""
        path = b"/".join(parts[:-1])
        if self._parent[1] >= 0 and self._parent[0] == path:
            return self._parent[1]
        try:
            fd = self._open_directory(path)
        except (FileNotFoundError, NotADirectoryError):  # missing, or a whiteout
            fd = self._make_directories(parts[:-1])
        except OSError as e:
            raise _bad_parent(path, e) from None
        self.close()
        self._parent = (path, fd)
        return fd

    def _open_directory(self, path: bytes) -> int:
        return syscalls.openat2(self._root, os.fsdecode(path) or ".", os.O_RDONLY | os.O_DIRECTORY, resolve=_RESOLVE)

    def _make_directories(self, parts: list[bytes]) -> int:
        fd = self._open_directory(b"")
        try:
            for depth, part in enumerate(parts, 1):
                if not self._plain and part.startswith(WHITEOUT) and parts[0] != AUFS_LINKS:
                    raise Invalid(f"the directory name {_show(part)} is reserved", "make the archive without it")
                if self._remove_whiteout(fd, part):
                    self.opaque[b"/".join(parts[:depth])] = None
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
                below = os.open(part, _DIR, dir_fd=fd)
                os.close(fd)
                fd = below
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
            f"{_show(path)} in the archive has a path through a link or a file", "the archive is hostile or damaged"
        )
    return e


def _first(paths: dict[bytes, None]) -> str:
    more = len(paths) - 1
    return _show(next(iter(paths))) + (f" and {more} more" if more else "")


def _show(name: bytes) -> str:
    return shorten(os.fsdecode(name))


def split(name: bytes) -> list[bytes]:
    """Split a member's name into components; empty for the root itself. Invalid if it has ``..`` or is too long."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise Invalid(f"{_show(name)} in the archive has a path with '..'", "make the archive without '..'")
    if b"\0" in name or len(name) > MAX_PATH or len(parts) > MAX_COMPONENTS or any(len(p) > 255 for p in parts):
        raise Invalid(f"{_show(name)} in the archive is too long or deep a name", "shorten it")
    return parts


def _is_aufs(parts: list[bytes]) -> bool:
    return any(part.startswith(AUFS) for part in parts[:-1]) or (parts[-1].startswith(AUFS) and parts[-1] != OPAQUE)


def _is_whiteout(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def _check_capability(entry: Member, value: bytes) -> None:
    """Check that file capabilities (capabilities(7)) have revision 2, which applies in any user namespace."""
    if len(value) != 20 or int.from_bytes(value[:4], "little") & 0xFF000000 != _VFS_CAP_REVISION_2:
        raise Invalid(f"{_show(entry.name)} has file capabilities of an unknown revision", "set them again with setcap")
