"""Intervals of nftables' sets and maps whose key has one part; `netlink.maps` has those of concatenations.

In the kernel such an interval is two elements: one begins it, and one, flagged as an end, is the first key behind it
(net/netfilter/nft_set_rbtree.c). One that reaches to the last possible key has no end. Keys are in network byte order.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final

from insula.kernel.netlink import attributes
from insula.kernel.netlink.maps import KeyInterval, MapElements
from insula.kernel.netlink.nftables import (
    DATA,
    FLAGS,
    KEY,
    NftablesSocket,
    add_packed,
    delete_packed,
    packed_element,
    packed_value,
    unpacked,
)
from insula.kernel.netlink.socket import Request

_IS_END: Final = 1  # NFT_SET_ELEM_INTERVAL_END


def read(socket: NftablesSocket, table: str, name: str) -> dict[KeyInterval, bytes]:
    """Return the intervals of a set or map of a table `inet`; none if it is missing. NetlinkError."""
    starts: dict[bytes, bytes] = {}
    ends: list[bytes] = []
    for packed in socket.elements("inet", table, name):
        element = attributes.parse(packed)
        key = unpacked(element[KEY])
        if int.from_bytes(element.get(FLAGS, b""), "big") & _IS_END:
            ends.append(key)
        else:
            starts[key] = unpacked(element.get(DATA))
    ends.sort()
    return {KeyInterval(key, _last(key, ends)): value for key, value in starts.items()}


def add(table: str, name: str, intervals: MapElements) -> Iterator[Request]:
    """Yield requests that add intervals. One that overlaps with another is an error (EEXIST)."""
    return add_packed("inet", table, name, (each for key, value in intervals.items() for each in _packed(key, value)))


def delete(table: str, name: str, intervals: Iterable[KeyInterval]) -> Iterator[Request]:
    """Yield requests that delete intervals; a missing one is an error (ENOENT)."""
    return delete_packed("inet", table, name, (each for key in intervals for each in _packed(key)))


def _packed(key: KeyInterval, value: bytes = b"") -> Iterator[bytes]:
    """Yield the attributes of the two elements of an interval."""
    yield packed_element(key.first, packed_value(DATA, value) if value else b"")
    if key.last != b"\xff" * len(key.last):
        yield packed_element(_step(key.last, 1), attributes.attributes((FLAGS, struct.pack("!I", _IS_END))))


def _last(key: bytes, ends: list[bytes]) -> bytes:
    """Return the last key of an interval: the one before the next end."""
    at = bisect_right(ends, key)
    return _step(ends[at], -1) if at < len(ends) else b"\xff" * len(key)


def _step(key: bytes, by: int) -> bytes:
    return (int.from_bytes(key, "big") + by).to_bytes(len(key), "big")
