"""Nftables over netlink: set elements, and rules that were recorded from the kernel before.

libnftables (`kernel.nftables`) parses text, and reads generation, tables, chains and sets of the namespace before each
command, which takes 0.3 to 0.5 ms. The messages here are ready-made, and need one system call in each direction. Rules
are never encoded here: libnftables installs them once, and `recorded` copies what the kernel then lists.

A set's key is its raw bytes: the parts of a concatenation follow each other, each padded to four bytes; the name of a
device is padded to 16 (include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h).
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from insula.kernel.netlink import attributes
from insula.kernel.netlink.attributes import NESTED
from insula.kernel.netlink.socket import ACK, CREATE, NetlinkError, NetlinkSocket, Request, error_in

IFNAME: Final = 16
_HEADS: Final = struct.Struct("=HHHHHH")  # the lengths and types of three nested attributes
_TWO_HEADS: Final = struct.Struct("=HHHH")
_FAMILIES: Final = {"inet": 1, "ip": 2, "bridge": 7, "ip6": 10}
_NETLINK_NETFILTER: Final = 12
_NFTABLES: Final = 10
_BEGIN, _END = 0x10, 0x11  # NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END
_NEWTABLE, _GETTABLE, _NEWCHAIN, _GETCHAIN, _NEWRULE, _GETRULE, _NEWSET, _GETSET = (
    _NFTABLES << 8 | number for number in (0, 1, 3, 4, 6, 7, 9, 10)
)
_NEWSETELEM, _GETSETELEM, _DELSETELEM, _GETGEN = (_NFTABLES << 8 | number for number in (12, 13, 14, 16))
FIRST_GENERATION: Final = 1
"""The generation of a network namespace whose rules were never changed."""
_TABLE, _SET, _ELEMENTS = 1, 2, 3
_ELEMENT, _VALUE = 1, 1
KEY, DATA, FLAGS, KEY_END = 1, 2, 3, 10
"""Attributes of an element: NFTA_SET_ELEM_KEY and so on."""
_TIMEOUT, _EXPIRATION, _USER_DATA, _EXPRESSION, _EXPRESSIONS = 4, 5, 6, 7, 11  # of an element
_EXPRESSION_DATA = 2
_COUNTER_BYTES, _COUNTER_PACKETS = 1, 2
_COMMENT = 0  # NFTNL_UDATA_SET_ELEM_COMMENT of libnftnl
_GENERATION, _SET_ID = 1, 10
_APPEND: Final = 0x800
_TOGETHER: Final = 512  # elements in one message: an attribute has at most 64 KiB
_FEWER: Final = 128  # of those with comments
_BUFFER: Final = 1 << 16
_RECORDED: Final = (
    # in the order of their creation: (list, create, attributes that are copied); the others are the kernel's own
    (_GETTABLE, _NEWTABLE, {1, 2}),  # name, flags
    (_GETSET, _NEWSET, {1, 2, 3, 4, 5, 8, 9, 11, 12, 13}),  # names, flags, key, policy, size, timeouts, user data
    (_GETCHAIN, _NEWCHAIN, {1, 3, 4, 5, 7}),  # names, hook, policy, type
    (_GETRULE, _NEWRULE, {1, 2, 4, 7}),  # names, expressions, user data
)

_DUMPS = 10
"""How often a long dump is repeated at most."""


class ElementCounter(NamedTuple):
    """The counter of a set's element: what has matched it since it was added. `comment` is that of the element."""

    comment: str
    bytes: int
    packets: int


class TimedElement(NamedTuple):
    """An element that the kernel removes by itself after some time."""

    key: bytes
    milliseconds: int
    comment: str


class NftablesSocket(NetlinkSocket):
    """A socket in the network namespace of the calling thread. Its methods may be called from any thread."""

    def __init__(self) -> None:
        super().__init__(_NETLINK_NETFILTER)

    def generation(self) -> int:
        """Return the generation of the namespace, which every transaction of rules increases."""
        answer = self.get(_GETGEN, _header(0))
        return int.from_bytes(attributes.parse(answer[4:])[_GENERATION], "big")

    def elements(self, family: str, table: str, name: str) -> Iterator[bytes]:
        """Yield the elements of a set or map, each as its packed attributes; none if it is missing. NetlinkError."""
        for listed in self.listed(family, table, name):
            for _, packed in attributes.pairs(listed):
                yield packed

    def dump_elements(self, wanted: bytes) -> list[bytes]:
        """Return the replies with a set's elements; `wanted` names the set. NetlinkError.

        The kernel resizes a hash table some milliseconds after it has grown. A dump of several messages that goes on
        meanwhile leaves elements out, or has them twice. So a long one is repeated until two have the same size.
        """
        answers, size = self.dump(_GETSETELEM, wanted), -1
        for _ in range(_DUMPS):
            if len(answers) < 2 or sum(map(len, answers)) == size:
                break
            size = sum(map(len, answers))
            answers = self.dump(_GETSETELEM, wanted)
        return answers

    def listed(self, family: str, table: str, name: str) -> list[bytes]:
        """Return the elements of a set or map, as packed lists of them; none if it is missing. NetlinkError."""
        try:
            answers = self.dump_elements(_set(family, table, name))
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return []
            raise
        return [attributes.parse(body[4:]).get(_ELEMENTS, b"") for body in answers]

    def keys(self, family: str, table: str, name: str) -> list[bytes]:
        """Return the keys of a set; none if it is missing. NetlinkError."""
        return [unpacked(attributes.parse(each)[KEY]) for each in self.elements(family, table, name)]

    def counters(self, family: str, table: str, name: str) -> dict[bytes, ElementCounter]:
        """Return the counters of a set's elements, by their keys; none if the set is missing. NetlinkError."""
        return _counters(self.elements(family, table, name))

    def counter(self, family: str, table: str, name: str, key: bytes) -> ElementCounter | None:
        """Return the counter of one element; None if it is missing. NetlinkError."""
        try:
            body = self.get(_GETSETELEM, _set(family, table, name) + _list_of([packed_element(key)]))
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        listed = attributes.parse(body[4:]).get(_ELEMENTS, b"")
        return _counters(packed for _, packed in attributes.pairs(listed)).get(key)

    def timed(self, family: str, table: str, name: str) -> list[TimedElement]:
        """Return the elements of a set with timeouts, with the time left; none if it is missing. NetlinkError."""
        return [_timed(each) for each in self.elements(family, table, name)]

    def recorded(self) -> Sequence[Request]:
        """Return requests that make the namespace's tables in another one: sets, chains and rules, without elements."""
        return [
            Request("add rules", create, CREATE | _APPEND, body[:4] + _copied(body[4:], kept, create, number))
            for list_, create, kept in _RECORDED
            for number, body in enumerate(self.dump(list_, _header(0)), 1)
        ]

    def transact(self, *requests: Request) -> None:
        """Carry out requests as one transaction, as a whole or not at all. NetlinkError has the first failure."""
        if not requests:
            return
        with self._lock:
            packet, first = bytearray(self._pack(_BEGIN, 0, _header(0, _NFTABLES))), self._sequence
            for request in requests[:-1]:
                packet += self._pack(request.type, request.flags, request.body)
            packet += self._pack(requests[-1].type, requests[-1].flags | ACK, requests[-1].body)
            last = self._sequence
            packet += self._pack(_END, 0, _header(0, _NFTABLES))
            if len(packet) > _BUFFER:  # the usual buffer is too small
                self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_SNDBUFFORCE", 32), 2 * len(packet))
            self.socket.sendto(packet, (0, 0))
            for answer in self._answers(first):
                at = min(max(answer.sequence - first, 1), len(requests)) - 1  # `first` is that of the whole transaction
                if error := error_in(requests[at].what, answer):
                    raise error
                if answer.sequence == last:
                    return


def add_elements(family: str, table: str, name: str, keys: Iterable[bytes], comment: str = "") -> Iterator[Request]:
    """Yield requests that add elements to a set, with a comment; those that it has are no error, and stay."""
    data = _user_data(comment)
    return add_packed(family, table, name, (packed_element(key, data) for key in keys))


def delete_elements(family: str, table: str, name: str, keys: Iterable[bytes]) -> Iterator[Request]:
    """Yield requests that delete elements of a set; a missing one is an error."""
    return delete_packed(family, table, name, map(packed_element, keys))


def refresh_elements(family: str, table: str, name: str, elements: Iterable[TimedElement]) -> Iterator[Request]:
    """Yield requests that add elements, or give those that exist a new timeout and comment.

    Before Linux 6.12 the timeout of an existing element can't be changed. So each is added, which changes nothing if it
    exists, deleted, and added again. In a transaction, packets see the old element until they see the new one.
    """
    left = iter(elements)
    while some := list(islice(left, _FEWER)):
        keys = [packed_element(each.key) for each in some]
        yield from add_packed(family, table, name, keys)
        yield from delete_packed(family, table, name, keys)
        yield from add_packed(family, table, name, map(_packed_timed, some))


def add_packed(family: str, table: str, name: str, packed: Iterable[bytes]) -> Iterator[Request]:
    """Yield requests that add elements of `packed_element` to a set or map. One that a map has with another value is an
    error (EEXIST)."""
    return _requests(f"add elements to {name}", _NEWSETELEM, CREATE, _set(family, table, name), packed)


def delete_packed(family: str, table: str, name: str, packed: Iterable[bytes]) -> Iterator[Request]:
    """Yield requests that delete elements of `packed_element` from a set or map; a missing one is an error (ENOENT)."""
    return _requests(f"delete elements of {name}", _DELSETELEM, 0, _set(family, table, name), packed)


def _requests(what: str, type_: int, flags: int, head: bytes, packed: Iterable[bytes]) -> Iterator[Request]:
    left = iter(packed)
    while some := list(islice(left, _TOGETHER)):
        yield Request(what, type_, flags, head + _list_of(some))


def _list_of(packed: Iterable[bytes]) -> bytes:
    return attributes.attributes((_ELEMENTS | NESTED, b"".join(packed)))


def packed_element(key: bytes, others: bytes = b"") -> bytes:
    """Return the attribute of an element: its key and other attributes. All headers are packed at once, since a port
    has a dozen elements."""
    size, padding = len(key) + 4, -len(key) % 4
    padded = size + padding
    heads = _HEADS.pack(padded + 8 + len(others), _ELEMENT | NESTED, padded + 4, KEY | NESTED, size, _VALUE)
    return heads + key + bytes(padding) + others


def packed_value(kind: int, value: bytes) -> bytes:
    """Return an attribute that has one value (NFTA_DATA_VALUE)."""
    size, padding = len(value) + 4, -len(value) % 4
    return _TWO_HEADS.pack(size + padding + 4, kind | NESTED, size, _VALUE) + value + bytes(padding)


def unpacked(data: bytes | None) -> bytes:
    """Return the value of an attribute like those of `packed_value`; empty if there is none."""
    return attributes.parse(data).get(_VALUE, b"") if data else b""


def _packed_timed(element: TimedElement) -> bytes:
    timeout = attributes.attributes((_TIMEOUT, struct.pack("!Q", element.milliseconds)))
    return packed_element(element.key, timeout + _user_data(element.comment))


def _timed(packed: bytes) -> TimedElement:
    element = attributes.parse(packed)
    left = int.from_bytes(element.get(_EXPIRATION, b""), "big")
    return TimedElement(unpacked(element[KEY]), left, attributes.string(element.get(_USER_DATA, b"")[2:]))


def _user_data(comment: str) -> bytes:
    """Return the attribute with a comment, encoded as nft(8) does; nothing if it is empty."""
    text = attributes.text(comment)
    return attributes.attributes((_USER_DATA, bytes((_COMMENT, len(text))) + text)) if comment else b""


def _counters(elements: Iterable[bytes]) -> dict[bytes, ElementCounter]:
    """Return the counters of elements by their keys, without those that have none."""
    found: dict[bytes, ElementCounter] = {}
    for packed in elements:
        element = attributes.parse(packed)
        expression = element.get(_EXPRESSION) or attributes.parse(element.get(_EXPRESSIONS, b"")).get(1, b"")
        counted = attributes.parse(attributes.parse(expression).get(_EXPRESSION_DATA, b""))
        if _COUNTER_BYTES in counted and _COUNTER_PACKETS in counted:
            comment = attributes.string(element.get(_USER_DATA, b"")[2:])
            numbers = (int.from_bytes(counted[each], "big") for each in (_COUNTER_BYTES, _COUNTER_PACKETS))
            found[unpacked(element[KEY])] = ElementCounter(comment, *numbers)
    return found


@functools.lru_cache(maxsize=64)
def _set(family: str, table: str, name: str) -> bytes:
    names = attributes.attributes((_TABLE, attributes.text(table)), (_SET, attributes.text(name)))
    return _header(_FAMILIES[family]) + names


def _header(family: int, subsystem: int = 0) -> bytes:
    """Return a `struct nfgenmsg`."""
    return struct.pack("!BBH", family, 0, subsystem)


def _copied(listed: bytes, kept: set[int], create: int, number: int) -> bytes:
    """Return the attributes with which an object is made that was listed with `listed`; `number` is a new one."""
    copied = [(type_, value) for type_, value in attributes.pairs(listed) if type_ in kept]
    return attributes.attributes(*copied, (_SET_ID, struct.pack("!I", number) if create == _NEWSET else None))
