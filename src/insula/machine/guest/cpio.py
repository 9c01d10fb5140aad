"""Write an initramfs: a cpio archive in the format "newc", which Linux unpacks into its first file system.

The kernel finds it in memory, puts the files into a tmpfs, and executes /init as process 1
(Documentation/driver-api/early-userspace/buffer-format.rst of Linux). Each file is a header of 110 hexadecimal digits,
its name with a NUL, and its contents, the last two padded to a multiple of four bytes.
"""

from __future__ import annotations

import posixpath
import stat

_FIELDS = "%08x" * 13


class CpioArchive:
    """An archive that is being written. Directories above a file are made with it, with mode 755, for root."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._made: set[str] = set()
        self._inode = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory, unless it is there."""
        if path in ("", "/") or path in self._made:
            return
        self._parents(path)
        self._made.add(path)
        self._entry(path, stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._parents(path)
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device."""
        self._parents(path)
        self._entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive. Nothing can be added afterwards."""
        self._inode = -1
        self._entry("TRAILER!!!", 0)
        return bytes(self._bytes)

    def _parents(self, path: str) -> None:
        self.directory(posixpath.dirname(path.strip("/")))

    def _entry(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = path.strip("/").encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        self._padded(b"070701" + (_FIELDS % fields).encode() + name)
        self._padded(data)

    def _padded(self, data: bytes) -> None:
        self._bytes += data
        self._bytes += bytes(-len(self._bytes) % 4)
