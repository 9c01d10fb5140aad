"""A FAT16 file system with some files, as bytes for a sparse file (Microsoft, FAT: General Overview of On-Disk Format).

Every operating system reads it, and so does UEFI. Names may be long (VFAT).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping
from typing import Final

SECTOR: Final = 512
_ROOT_ENTRIES: Final = 512
_LEAST, _MOST = 4085, 65524  # clusters: with fewer or more it would be FAT12 or FAT32
_ENTRY: Final = struct.Struct("<11sBBBHHHHHHHI")
_ATTRIBUTES_LONG, _LABEL, _DIRECTORY, _FILE = 0x0F, 0x08, 0x10, 0x20
_DATE: Final = 0x21  # the first day of 1980
_PLAIN: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_END: Final = 0xFFFF

Tree = dict[str, "bytes | Tree"]


def build(files: Mapping[str, bytes], label: str, size: int = 16 << 20) -> list[tuple[int, bytes]]:
    """Return what a file system with these files has, as pieces with their offsets. A name is a path: ``EFI/BOOT/X``.
    ValueError if `size` is not enough, or can't be that of a FAT16."""
    volume = _Volume(size)
    tree: Tree = {}
    for path, data in files.items():
        *parents, name = path.split("/")
        place = tree
        for each in parents:
            below = place.setdefault(each, {})
            assert isinstance(below, dict)
            place = below
        place[name] = data
    return volume.write(tree, label)


class _Volume:
    """The clusters that are in use. The table begins with two numbers that are of no cluster."""

    def __init__(self, size: int) -> None:
        self.sectors = size // SECTOR
        self.per_cluster = next((n for n in (1, 2, 4, 8, 16, 32, 64) if self.sectors // n <= _MOST), 0)
        count = self.sectors // (self.per_cluster or 1)
        self.fat_sectors = -(-(count + 2) * 2 // SECTOR)
        self.root = 1 + 2 * self.fat_sectors  # the first sector of the root directory
        self.data = self.root + _ROOT_ENTRIES * 32 // SECTOR
        self.clusters = (self.sectors - self.data) // (self.per_cluster or 1)
        if not self.per_cluster or not _LEAST <= self.clusters <= _MOST:
            raise ValueError(f"{size} bytes can't be a FAT16")
        self.fat = array("H", [0xFFF8, _END])
        self.pieces: list[tuple[int, bytes]] = []

    def write(self, tree: Tree, label: str) -> list[tuple[int, bytes]]:
        name = label.upper().encode("ascii").ljust(11)[:11]
        root = _entry(name, _LABEL, 0, 0) + b"".join(self._entries(tree, 0))
        if len(root) > _ROOT_ENTRIES * 32:
            raise ValueError("there are too many files")
        if len(self.fat) > self.clusters + 2:
            raise ValueError("the files are too large")
        table = self.fat.tobytes()
        fats = [((1 + number * self.fat_sectors) * SECTOR, table) for number in range(2)]
        return [(0, self._boot_sector(name)), *fats, (self.root * SECTOR, root), *self.pieces]

    def _boot_sector(self, label: bytes) -> bytes:
        many = self.sectors >= 1 << 16
        head = struct.pack(
            "<3s8sHBHBHHBHHHII",
            *(b"\xeb\x3c\x90", b"INSULA  ", SECTOR, self.per_cluster, 1, 2, _ROOT_ENTRIES),
            *(0 if many else self.sectors, 0xF8, self.fat_sectors, 63, 255, 0, self.sectors if many else 0),
        )
        rest = struct.pack("<BBBI11s8s", 0x80, 0, 0x29, 0x494E5355, label, b"FAT16   ")
        return (head + rest).ljust(510, b"\0") + b"\x55\xaa"

    def _reserve(self, size: int) -> int:
        """Reserve clusters for so many bytes, one after another, and return the first; 0 for none."""
        count = -(-size // (self.per_cluster * SECTOR))
        first = len(self.fat)
        self.fat.extend([*range(first + 1, first + count), _END][:count] if count else [])
        return first if count else 0

    def _put(self, cluster: int, data: bytes) -> None:
        self.pieces.append(((self.data + (cluster - 2) * self.per_cluster) * SECTOR, data))

    def _entries(self, tree: Tree, own: int) -> Iterator[bytes]:
        """The entries of a directory, whose cluster is `own`; what they lead to is written."""
        short: set[bytes] = set()
        for name, content in tree.items():
            alias = _alias(name, short)
            short.add(alias)
            if isinstance(content, bytes):
                cluster = self._reserve(len(content))
                if content:
                    self._put(cluster, content)
                made = _entry(alias, _FILE, cluster, len(content))
            else:
                cluster = self._directory(content, own)
                made = _entry(alias, _DIRECTORY, cluster, 0)
            yield b"".join(_long_entries(name, alias)) + made

    def _directory(self, tree: Tree, parent: int) -> int:
        slots = 2 + sum(1 + len([*_long_entries(name, b" " * 11)]) for name in tree)
        own = self._reserve(slots * 32)
        dots = _entry(b".".ljust(11), _DIRECTORY, own, 0) + _entry(b"..".ljust(11), _DIRECTORY, parent, 0)
        self._put(own, dots + b"".join(self._entries(tree, own)))
        return own


def _entry(name: bytes, attributes: int, cluster: int, size: int) -> bytes:
    return _ENTRY.pack(name, attributes, 0, 0, 0, _DATE, _DATE, 0, 0, _DATE, cluster, size)


def _is_short(name: str) -> bool:
    base, _, end = name.partition(".")
    return 0 < len(base) <= 8 and len(end) <= 3 and set(base + end) <= _PLAIN


def _alias(name: str, taken: set[bytes]) -> bytes:
    """The short name of a file: its own if it is one, else one that no other file of the directory has."""
    base, _, end = name.upper().rpartition(".") if "." in name else (name.upper(), "", "")
    if _is_short(name):
        return base.encode().ljust(8) + end.encode().ljust(3)
    plain = "".join(each for each in base if each in _PLAIN)[:6] or "FILE"
    extension = "".join(each for each in end if each in _PLAIN)[:3]
    for number in range(1, 10):
        found = f"{plain}~{number}".encode().ljust(8) + extension.encode().ljust(3)
        if found not in taken:
            return found
    raise ValueError(f"there are too many files like {name}")


def _long_entries(name: str, alias: bytes) -> Iterator[bytes]:
    """The entries that have a long name, the last part first; none for a short one."""
    if _is_short(name):
        return
    check = 0
    for byte in alias:
        check = ((check & 1) << 7 | check >> 1) + byte & 0xFF
    units = name.encode("utf-16-le") + b"\0\0"
    parts = [units[at : at + 26] for at in range(0, len(units), 26)]
    if len(units) % 26 == 2 and len(units) > 2:  # a name that fills its entries has no end
        parts.pop()
    for number, part in reversed([*enumerate(parts, 1)]):
        text = part.ljust(26, b"\xff")
        order = number | (0x40 if number == len(parts) else 0)
        yield bytes([order]) + text[:10] + bytes([_ATTRIBUTES_LONG, 0, check]) + text[10:22] + b"\0\0" + text[22:]
