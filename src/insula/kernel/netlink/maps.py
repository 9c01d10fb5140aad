"""Elements of nftables' maps and interval sets over netlink; sets of single keys are in `netlink.nftables`.

An element has a key, for an interval also the last key of it, and in a map a value. All are the kernel's raw bytes: the
parts of a concatenation follow each other, each padded to four bytes (include/uapi/linux/netfilter/nf_tables.h).
Intervals are supported in sets whose key is a concatenation (NFT_SET_CONCAT): of the parts of such a key, each may be a
range of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from insula.kernel.netlink import attributes
from insula.kernel.netlink.nftables import (
    DATA,
    KEY,
    KEY_END,
    NftablesSocket,
    add_packed,
    delete_packed,
    packed_element,
    packed_value,
    unpacked,
)
from insula.kernel.netlink.socket import Request

_HEAD: Final = struct.Struct("=HH")


class KeyInterval(NamedTuple):
    """The key of an element: its first key, and its last one; empty if it is a single key."""

    first: bytes
    last: bytes = b""


MapElements = Mapping[KeyInterval, bytes]
"""The values of elements by key; empty in a set."""


def read(socket: NftablesSocket, family: str, table: str, name: str) -> dict[KeyInterval, bytes]:
    """Return the elements of a set or map; none if it is missing. NetlinkError."""
    found: dict[KeyInterval, bytes] = {}
    for listed in socket.listed(family, table, name):
        found.update(_alike(listed) or map(_parsed, (packed for _, packed in attributes.pairs(listed))))
    return found


def _alike(listed: bytes) -> list[tuple[KeyInterval, bytes]]:
    """Return key and value of elements that have the same attributes in the same order; none if they differ.

    This takes a tenth of the time, which matters for a map with ten thousand elements.
    """
    size = _HEAD.unpack_from(listed)[0] if listed else 0
    if not size or size % 4 or len(listed) % size:
        return []
    layout, kinds, at = "=4s", [], 4
    for kind, data in attributes.pairs(listed[4:size]):
        length = _HEAD.unpack_from(data)[0] - 4 if len(data) > 4 else 0  # that of the value, without what pads it
        if kind not in (KEY, KEY_END, DATA) or length <= 0:
            return []
        layout += f"8s{length}s{-length % 4}x"
        kinds.append(kind)
        at += 8 + length + -length % 4
    if at != size or kinds not in ([KEY], [KEY, DATA], [KEY, KEY_END], [KEY, DATA, KEY_END]):
        return []
    rows = list(struct.iter_unpack(layout, listed))
    if len({row[0] + b"".join(row[1::2]) for row in rows}) != 1:
        return []
    values = {kind: 2 + 2 * place for place, kind in enumerate(kinds)}
    if KEY_END in values:
        last, value = values[KEY_END], values.get(DATA)
        return [(KeyInterval(row[2], row[last]), row[value] if value else b"") for row in rows]
    return [(KeyInterval(row[2]), row[4] if len(row) > 3 else b"") for row in rows]


def _parsed(packed: bytes) -> tuple[KeyInterval, bytes]:
    element = attributes.parse(packed)
    key, last, value = (unpacked(element.get(each)) for each in (KEY, KEY_END, DATA))
    return KeyInterval(key, last), value


def add(family: str, table: str, name: str, elements: MapElements) -> Iterator[Request]:
    """Yield requests that add elements. One that exists with another value is an error (EEXIST)."""
    return add_packed(family, table, name, (_packed(key, value) for key, value in elements.items()))


def delete(family: str, table: str, name: str, keys: Iterable[KeyInterval]) -> Iterator[Request]:
    """Yield requests that delete elements; a missing one is an error (ENOENT)."""
    return delete_packed(family, table, name, map(_packed, keys))


def change(family: str, table: str, name: str, have: MapElements, wanted: MapElements) -> list[Request]:
    """Return requests that change the elements `have` to those `wanted`, for one transaction."""
    gone = [key for key, value in have.items() if wanted.get(key) != value]
    new = {key: value for key, value in wanted.items() if have.get(key) != value}
    return [*delete(family, table, name, gone), *add(family, table, name, new)]


def _packed(key: KeyInterval, value: bytes = b"") -> bytes:
    last = packed_value(KEY_END, key.last) if key.last else b""
    return packed_element(key.first, last + packed_value(DATA, value) if value else last)
