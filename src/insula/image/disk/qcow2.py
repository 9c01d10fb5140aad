"""A disk image of format qcow2, versions 2 and 3, read only (docs/interop/qcow2.txt of QEMU).

The disk is cut into clusters. A table of two levels has for each where it is in the file: the entries of the first (L1)
lead to tables of the second (L2), and those to clusters. What is not in the tables is zeros, since an image with a
backing file is refused.

The file may be hostile: every offset and size in it is checked before it is used, and nothing that it names is opened.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from insula.image.disk.raw import SECTOR, firmware_of
from insula.model.disk_images import Firmware
from insula.model.errors import Invalid

MAGIC: Final = b"QFI\xfb"
MAX_L1: Final = 32 << 20
"""Bytes of the first table, as in QEMU."""
_MAX_HEADER: Final = 64 << 10
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_BITS: Final = range(9, 22)
_CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_KNOWN: Final = 1 | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED  # bit 0: counts of references may be wrong
_EXT_DATA_FILE, _EXT_BACKING, _EXT_ENCRYPTION = 0x44415441, 0xE2792ACA, 0x0537BE77
_OFFSET: Final = 0x00FFFFFFFFFFFE00
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1
_RESERVED: Final = 0x3F000000000001FE  # of an L2 entry that is not compressed
_RESERVED_L1: Final = 0x7F000000000001FF
_CONVERT: Final = "convert it with: qemu-img convert -O qcow2 FILE NEW"
_DAMAGED: Final = "it is damaged, or hostile: `qemu-img check` shows more"


class Header(NamedTuple):
    """The header of an image that has everything in itself."""

    version: int
    cluster_bits: int
    size: int
    l1_entries: int
    l1_offset: int


def read_header(data: bytes) -> Header:
    """Decode the beginning of an image, and refuse what is not a disk in one file. Invalid."""
    if len(data) < _V2.size or not data.startswith(MAGIC):
        raise Invalid("the disk image is not of format qcow2", "give its format with --format raw or qcow2")
    _, version, backing, _, bits, size, crypt, l1_entries, l1_offset, *_ = _V2.unpack_from(data)
    if version not in (2, 3):
        raise Invalid(f"version {version} of qcow2 is not supported", "versions 2 and 3 are")
    if backing:
        raise Invalid("the disk image has a backing file", f"only whole disks are imported: {_CONVERT}")
    if crypt:
        raise Invalid("the disk image is encrypted", f"{_CONVERT}, with its key")
    length = _V2.size
    if version == 3:
        length = _check_features(data)
    for kind in _extensions(data, length):
        if kind == _EXT_DATA_FILE:
            raise Invalid("the disk image has an external data file", f"only whole disks are imported: {_CONVERT}")
        if kind == _EXT_BACKING:
            raise Invalid("the disk image names the format of a backing file", _CONVERT)
        if kind == _EXT_ENCRYPTION:
            raise Invalid("the disk image is encrypted", f"{_CONVERT}, with its key")
    if bits not in _BITS:
        raise _damaged(f"clusters of 2^{bits} bytes")
    return Header(version, bits, size, l1_entries, l1_offset)


def _check_features(data: bytes) -> int:
    """Refuse features that need more than this file or this code has. Return the length of the header."""
    if len(data) < _V2.size + _V3.size:
        raise _damaged("a header that is cut off")
    features, _, _, _, length = _V3.unpack_from(data, _V2.size)
    if features & _DATA_FILE:
        raise Invalid("the disk image has an external data file", f"only whole disks are imported: {_CONVERT}")
    if features & _CORRUPT:
        raise Invalid("the disk image is marked as corrupt", "repair it with: qemu-img check -r all FILE")
    if features & _EXTENDED:
        raise Invalid("the disk image has extended L2 entries", _CONVERT)
    if features & ~_KNOWN:
        raise Invalid("the disk image has features that are not known here", _CONVERT)
    if not _V2.size + _V3.size <= length <= min(len(data), _MAX_HEADER) or length % 8:
        raise _damaged(f"a header of {length} bytes")
    compression = data[104] if length > 104 else 0
    if compression or features & _COMPRESSION:
        raise Invalid("the clusters of the disk image are compressed with zstd", f"{_CONVERT}, which uses zlib")
    return int(length)


def _extensions(data: bytes, at: int) -> Iterator[int]:
    """The kinds of the header's extensions, which end with 0."""
    while at + _EXTENSION.size <= len(data):
        kind, length = _EXTENSION.unpack_from(data, at)
        if not kind:
            return
        yield kind
        at += _EXTENSION.size + -(-length // 8) * 8
    raise _damaged("a header without an end")


class Qcow2Disk:
    """A disk image of format qcow2. `size` is a whole number of sectors, at most `most` bytes. Invalid, OSError."""

    def __init__(self, fd: int, most: int) -> None:
        self._fd = fd
        self._end = os.fstat(fd).st_size
        header = read_header(os.pread(fd, _MAX_HEADER, 0))
        self.size = -(-header.size // SECTOR) * SECTOR
        if not self.size:
            raise Invalid("the disk image is empty", "give a disk image")
        if self.size > most:  # before the tables, whose length depends on it
            raise Invalid(f"the disk has {self.size} bytes, and may have {most}", "import a smaller disk")
        self._bits = header.cluster_bits
        self._bytes = 1 << self._bits
        self._span = self._bytes * (self._bytes // 8)
        self._reserved = _RESERVED | (_ZERO if header.version == 2 else 0)
        tables = -(-self.size // self._span)
        if tables * 8 > MAX_L1 or header.l1_entries < tables:
            raise _damaged(f"a table of {header.l1_entries} entries for {self.size} bytes")
        self._l1 = _numbers(self._exactly(header.l1_offset, tables * 8))
        self._l2: tuple[int, array[int]] = -1, array("Q")  # the table that was read last, with its number
        self._unpacked: tuple[int, bytes] = 0, b""  # the cluster that was decompressed last, with its entry

    def next_data(self, offset: int) -> int:
        """Return the first offset from `offset` on that may have something else than zeros; `size` if none has."""
        while offset < self.size:
            number, rest = divmod(offset, self._span)
            table = self._table(number)
            for index in range(rest >> self._bits, len(table)):
                entry = table[index]
                if entry & _COMPRESSED or (entry & _OFFSET and not entry & _ZERO):
                    return min(self.size, max(offset, number * self._span + (index << self._bits)))
            offset = (number + 1) * self._span
        return self.size

    def firmware(self) -> Firmware:
        """The firmware that the first sector is for."""
        return firmware_of(self.read(0, SECTOR))

    def read(self, offset: int, length: int) -> bytes:
        """Return what the disk has there, inside of its size. Invalid, OSError."""
        pieces = []
        while length:
            at = offset & (self._bytes - 1)
            count = min(length, self._bytes - at)
            pieces.append(self._part(offset, at, count))
            offset, length = offset + count, length - count
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _part(self, offset: int, at: int, count: int) -> bytes:
        """`count` bytes from `at` on of the cluster with `offset`."""
        number, rest = divmod(offset, self._span)
        table = self._table(number)
        entry = table[rest >> self._bits] if table else 0
        if entry & _COMPRESSED:
            return self._decompressed(entry)[at : at + count]
        if entry & self._reserved:
            raise _damaged("an entry with reserved bits")
        host = entry & _OFFSET
        if not host or entry & _ZERO:
            return bytes(count)
        if host & (self._bytes - 1) or host >= self._end:
            raise _damaged("an entry that leads to no cluster")
        data = os.pread(self._fd, count, host + at)
        return data + bytes(count - len(data))  # the last cluster of a file may be cut off

    def _decompressed(self, entry: int) -> bytes:
        """The whole cluster of an entry for a compressed one."""
        if self._unpacked[0] == entry:
            return self._unpacked[1]
        shift = 62 - (self._bits - 8)
        host = entry & ((1 << shift) - 1)
        sectors = (entry & (_COMPRESSED - 1)) >> shift
        packed = os.pread(self._fd, (sectors + 1) * SECTOR - host % SECTOR, host)
        try:
            data = zlib.decompressobj(-12).decompress(packed, self._bytes)
        except zlib.error:
            data = b""
        if len(data) != self._bytes:
            raise _damaged("a cluster that does not decompress")
        self._unpacked = entry, data
        return data

    def _table(self, number: int) -> array[int]:
        """The table of the second level with this number; empty if there is none."""
        if self._l2[0] != number:
            entry = self._l1[number]
            host = entry & _OFFSET
            if entry & _RESERVED_L1 or host & (self._bytes - 1):
                raise _damaged("a table with reserved bits")
            self._l2 = number, _numbers(self._exactly(host, self._bytes)) if host else array("Q")
        return self._l2[1]

    def _exactly(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset) if offset <= self._end - length else b""
        if len(data) != length:
            raise _damaged("a table that is not in the file")
        return data


def _numbers(data: bytes) -> array[int]:
    """Numbers of 64 bits, most significant byte first."""
    found = array("Q", data)
    if sys.byteorder == "little":
        found.byteswap()
    return found


def _damaged(what: str) -> Invalid:
    return Invalid(f"the disk image has {what}", _DAMAGED)
