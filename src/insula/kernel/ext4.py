"""The size of an ext4 (Documentation/filesystems/ext4/super.rst of Linux), which grows while it is mounted."""

from __future__ import annotations

import fcntl
import os
import struct

_RESIZE_FS = 0x40086610  # EXT4_IOC_RESIZE_FS, with the number of blocks
_SUPERBLOCK, _SIZE = 1024, 1024
_BLOCKS_LOW, _SCALE, _BLOCKS_HIGH = 0x4, 0x18, 0x150
_LARGEST = 6  # blocks of 64 KiB


def missing(path: str) -> int:
    """How many bytes of a disk its file system does not have, in whole blocks. ValueError if it has none; OSError."""
    blocks, block, size = _measured(path)
    return max(0, size // block - blocks) * block


def grow(path: str, mounted: str) -> None:
    """Have the file system that is mounted there from a disk be as large as that. ValueError, OSError."""
    blocks, block, size = _measured(path)
    if size // block <= blocks:
        return
    fd = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RESIZE_FS, struct.pack("=Q", size // block))
    finally:
        os.close(fd)


def _measured(path: str) -> tuple[int, int, int]:
    """The number of blocks of a file system, their size, and the size of the disk in bytes."""
    with open(path, "rb", buffering=0) as file:
        superblock = os.pread(file.fileno(), _SIZE, _SUPERBLOCK)
        size = os.lseek(file.fileno(), 0, os.SEEK_END)
    if len(superblock) < _SIZE:
        raise ValueError(f"there is no file system on {path}")
    low, scale, high = (_number(superblock, at) for at in (_BLOCKS_LOW, _SCALE, _BLOCKS_HIGH))
    if scale > _LARGEST:
        raise ValueError(f"there is no file system on {path}")
    return high << 32 | low, 1024 << scale, size


def _number(superblock: bytes, at: int) -> int:
    return int.from_bytes(superblock[at : at + 4], "little")
