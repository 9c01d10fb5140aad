"""Intervals of nftables' sets and maps whose key has one part; `netlink.maps` has those of concatenations.

In the kernel such an interval is two elements: one begins it, and one, flagged as an end, is the first key behind it
(net/netfilter/nft_set_rbtree.c). One that reaches to the last possible key has no end. Keys are in network byte order.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

from insula.kernel.netlink import attributes
from insula.kernel.netlink.attributes import NESTED
from insula.kernel.netlink.maps import KeyInterval, MapElements
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netlink.socket import CREATE, NetlinkError, Request

_NEWSETELEM, _GETSETELEM, _DELSETELEM = (10 << 8 | number for number in (12, 13, 14))
_INET: Final = struct.pack("!BBH", 1, 0, 0)  # struct nfgenmsg
_TABLE, _SET, _ELEMENTS, _ELEMENT = 1, 2, 3, 1
_KEY, _DATA, _FLAGS = 1, 2, 3
_VALUE: Final = 1
_TOGETHER: Final = 512  # elements in one message: an attribute has at most 64 KiB
_IS_END: Final = 1  # NFT_SET_ELEM_INTERVAL_END


def read(socket: NftablesSocket, table: str, name: str) -> dict[KeyInterval, bytes]:
    """Return the intervals of a set or map of a table `inet`; none if it is missing. NetlinkError."""
    try:
        answers = socket.dump(_GETSETELEM, _head(table, name))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return {}
        raise
    starts: dict[bytes, bytes] = {}
    ends: list[bytes] = []
    for body in answers:
        for _, packed in attributes.pairs(attributes.parse(body[4:]).get(_ELEMENTS, b"")):
            element = attributes.parse(packed)
            if int.from_bytes(element.get(_FLAGS, b""), "big") & _IS_END:
                ends.append(_unpacked(element[_KEY]))
            else:
                starts[_unpacked(element[_KEY])] = _unpacked(element[_DATA]) if _DATA in element else b""
    ends.sort()
    return {KeyInterval(key, _last(key, ends)): value for key, value in starts.items()}


def add(table: str, name: str, intervals: MapElements) -> Iterator[Request]:
    """Yield requests that add intervals. One that overlaps with another is an error (EEXIST)."""
    return _requests(f"add intervals to {name}", _NEWSETELEM, CREATE, _head(table, name), intervals.items())


def delete(table: str, name: str, intervals: Iterable[KeyInterval]) -> Iterator[Request]:
    """Yield requests that delete intervals; a missing one is an error (ENOENT)."""
    listed = ((key, b"") for key in intervals)
    return _requests(f"delete intervals of {name}", _DELSETELEM, 0, _head(table, name), listed)


def _requests(
    what: str, type_: int, flags: int, head: bytes, intervals: Iterable[tuple[KeyInterval, bytes]]
) -> Iterator[Request]:
    left = (element for key, value in intervals for element in _packed(key, value))
    while some := list(islice(left, _TOGETHER)):
        yield Request(what, type_, flags, head + attributes.attributes((_ELEMENTS | NESTED, b"".join(some))))


def _packed(key: KeyInterval, value: bytes) -> Iterator[bytes]:
    """Yield the attributes of the two elements of an interval."""
    data = (_DATA | NESTED, attributes.attributes((_VALUE, value))) if value else (_DATA, None)
    yield attributes.attributes((_ELEMENT | NESTED, attributes.attributes(_key(key.first), data)))
    if key.last != b"\xff" * len(key.last):
        end = attributes.attributes(_key(_step(key.last, 1)), (_FLAGS, struct.pack("!I", _IS_END)))
        yield attributes.attributes((_ELEMENT | NESTED, end))


def _key(key: bytes) -> tuple[int, bytes]:
    return _KEY | NESTED, attributes.attributes((_VALUE, key))


def _last(key: bytes, ends: list[bytes]) -> bytes:
    """Return the last key of an interval: the one before the next end."""
    at = bisect_right(ends, key)
    return _step(ends[at], -1) if at < len(ends) else b"\xff" * len(key)


def _step(key: bytes, by: int) -> bytes:
    return (int.from_bytes(key, "big") + by).to_bytes(len(key), "big")


def _head(table: str, name: str) -> bytes:
    return _INET + attributes.attributes((_TABLE, attributes.text(table)), (_SET, attributes.text(name)))


def _unpacked(data: bytes) -> bytes:
    return attributes.parse(data).get(_VALUE, b"")
