"""Empty disks of machines: raw sparse files with an ext4, copies of one for each size.

mkfs.ext4 takes as long as a machine needs to start, and the file systems of one size are alike but for their UUID and
the seed of their hashes of names. So it is run once a size. A copy has only the blocks with something in them, and a
UUID and a seed of its own: whoever knows the seed can choose names that make a directory slow.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from insula.kernel import copies
from insula.model.errors import Failed

_TIMEOUT: Final = 60
_MKFS: Final = ("/sbin/mkfs.ext4", "-q", "-F", "-O", "metadata_csum_seed", "-E", "lazy_itable_init=1,nodiscard")
"""The seed of checksums is stored (metadata_csum_seed), so that they stay right with another UUID."""
_DIRECTORIES: Final = ("upper", "work")
"""What an overlay needs (`insula.agent.root`): a guest would make them at its first start."""
_MOST: Final = 16
"""Sizes that are kept; each takes less than a MiB."""
_SUPERBLOCK: Final = 1024
"""Where the superblock is, and its size (Documentation/filesystems/ext4/super.rst of Linux)."""
_UUID, _HASH_SEED, _CHECKSUM = 0x68, 0xEC, 0x3FC
_POLYNOMIAL: Final = 0x82F63B78
"""Of CRC-32C, whose lowest bit comes first."""


class BlankDisks:
    """Makes disks from files DIRECTORY/SIZE, which are as mkfs.ext4 has made them and may be removed at any time.
    Methods block, and may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()

    def make(self, path: Path, size: int, *, of_root: bool = True) -> None:
        """Make the disk `path` with `size` bytes, complete or not at all: that of a root, or one that is really empty.
        Failed, OSError."""
        draft = path.with_name(f"{path.name}.new")
        blank = self._blank(size, of_root)
        try:
            with draft.open("wb+") as file:
                os.fchmod(file.fileno(), 0o600)
                copies.copy(blank, file.fileno())
                renew(file.fileno())
        finally:
            os.close(blank)
        draft.rename(path)

    def _blank(self, size: int, of_root: bool) -> int:
        """A descriptor of an empty disk of this size, which is made if there is none."""
        path = self._directory / (str(size) if of_root else f"{size}-empty")
        with self._lock:
            if not path.exists():
                self._directory.mkdir(parents=True, exist_ok=True)
                self._forget()
                draft = path.with_name(f"{path.name}.new")
                _format(draft, size, _DIRECTORIES if of_root else ())
                draft.rename(path)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _forget(self) -> None:
        """Remove the oldest, so that tenants who ask for many sizes don't fill the disk."""
        found = sorted(self._directory.iterdir(), key=lambda each: each.stat().st_mtime_ns)
        for each in found[: max(0, len(found) - _MOST + 1)]:
            with contextlib.suppress(FileNotFoundError):
                each.unlink()


def _format(path: Path, size: int, directories: Sequence[str]) -> None:
    with path.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size)
    try:
        with tempfile.TemporaryDirectory() as content:
            for name in directories:
                Path(content, name).mkdir(mode=0o755)
            command = [*_MKFS, "-d", content, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Failed("the disk of the machine can't be made in time", "look at the disk below the root") from None
    if done.returncode:
        raise Failed(f"the disk of the machine can't be made: {done.stderr.strip()[-200:]}", "free some space")


def renew(disk: int) -> None:
    """Give the ext4 on a disk, which is empty, a UUID and a seed of hashes of its own. OSError."""
    block = bytearray(os.pread(disk, _SUPERBLOCK, _SUPERBLOCK))
    uuid = bytearray(os.urandom(16))
    uuid[6], uuid[8] = uuid[6] & 0x0F | 0x40, uuid[8] & 0x3F | 0x80  # version 4 (RFC 9562)
    block[_UUID : _UUID + 16], block[_HASH_SEED : _HASH_SEED + 16] = uuid, os.urandom(16)
    struct.pack_into("<I", block, _CHECKSUM, crc32c(block[:_CHECKSUM]))
    os.pwrite(disk, block, _SUPERBLOCK)


def crc32c(data: bytes | bytearray) -> int:
    """CRC-32C as ext4 has it: its bits are not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE: Final = [_entry(byte) for byte in range(256)]
