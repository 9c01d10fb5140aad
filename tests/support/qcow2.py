"""Disk images of format qcow2 for tests (docs/interop/qcow2.txt of QEMU)."""

from __future__ import annotations

import struct
import zlib

COPIED, COMPRESSED = 1 << 63, 1 << 62


def qcow2(data: bytes, *, bits: int = 16, version: int = 3, compressed: bool = False, extensions: bytes = b"") -> bytes:
    """A whole disk. Clusters of zeros are left out."""
    cluster = 1 << bits
    count = -(-len(data) // cluster)
    per_table = cluster // 8
    tables = -(-count // per_table)
    l1_clusters = -(-tables * 8 // cluster)
    made = bytearray((1 + l1_clusters) * cluster)
    for number in range(tables):
        entries = []
        for index in range(number * per_table, (number + 1) * per_table):
            piece = data[index * cluster : (index + 1) * cluster]
            entries.append(_put(made, piece.ljust(cluster, b"\0"), bits, compressed) if piece.strip(b"\0") else 0)
        if any(entries):
            _align(made, cluster)
            struct.pack_into(">Q", made, cluster + number * 8, len(made) | COPIED)
            made += struct.pack(f">{per_table}Q", *entries)
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 0, 0, bits, len(data), 0, tables, cluster, 0, 0, 0, 0)
    if version == 3:
        header += struct.pack(">QQQII", 0, 0, 0, 4, 104)
    made[: len(header) + len(extensions)] = header + extensions
    return bytes(made)


def extension(kind: int, data: bytes = b"") -> bytes:
    """An extension of the header."""
    return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


def _put(made: bytearray, piece: bytes, bits: int, compressed: bool) -> int:
    """Append a cluster, and return its entry."""
    if compressed:
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        packed = packer.compress(piece) + packer.flush()
        if len(packed) < len(piece):
            at = len(made)
            made += packed
            sectors = (at % 512 + len(packed) - 1) // 512
            return COMPRESSED | sectors << (62 - (bits - 8)) | at
    _align(made, 1 << bits)
    at = len(made)
    made += piece
    return at | COPIED


def _align(made: bytearray, cluster: int) -> None:
    made += bytes(-len(made) % cluster)
