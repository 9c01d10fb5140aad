"""The attributes of netlink messages: type, length and value, padded to four bytes, which may nest (netlink(7)).

A value's encoding depends on its type: numbers in the machine's byte order, names with a NUL at the end, addresses in
network byte order. `attributes`, `u32`, `mac` and so on pack values; `parse` and `integer` unpack them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF
HEAD: Final = struct.Struct("=HH")


def attributes(*values: tuple[int, bytes | str | int | None]) -> bytes:
    """Pack attributes in order; those with the value None are left out."""
    parts = []
    for type_, value in values:
        if isinstance(value, bytes):
            parts.append(HEAD.pack(len(value) + 4, type_) + value + bytes(-len(value) % 4))
    return b"".join(parts)


nested = attributes


def pairs(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute, up to the first malformed one."""
    offset = 0
    while offset + 4 <= len(data):
        length, type_ = HEAD.unpack_from(data, offset)
        if length < 4:
            break
        yield type_ & _TYPE_MASK, data[offset + 4 : offset + length]
        offset += -(-length // 4) * 4


def parse(data: bytes) -> dict[int, bytes]:
    """Return the attributes by type; of several with one type, the last."""
    found, offset, last = {}, 0, len(data) - 4
    unpack = HEAD.unpack_from  # this loop is most of the time that reading takes
    while offset <= last:
        length, type_ = unpack(data, offset)
        if length < 4:
            break
        found[type_ & _TYPE_MASK] = data[offset + 4 : offset + length]
        offset += length + 3 & ~3
    return found


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def integer(value: bytes) -> int:
    return int.from_bytes(value[:4], "little" if struct.pack("=H", 1)[0] else "big")


def text(value: str) -> bytes:
    return value.encode() + b"\0"


def string(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def mac(value: str) -> bytes:
    return bytes.fromhex(value.replace(":", ""))
