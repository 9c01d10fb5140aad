"""The keys in nftables' sets as the kernel has them: bytes, by a dump of its netlink family (NFT_MSG_GETSETELEM).

libnftables lists sets as well, with types and as text, and takes 0.1 ms for each element. Who only wants to know
whether anything is in a set that should not be there reads keys. A concatenation's parts follow each other, each padded
to four bytes; the name of a device is padded to 16 (include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from insula.kernel import rtattr

IFNAME: Final = 16
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_FAMILIES: Final = {"inet": 1, "ip": 2, "bridge": 7, "ip6": 10}
_NETLINK_NETFILTER, _GETSETELEM, _REQUEST_DUMP = 12, 10 << 8 | 13, 0x301
_ERROR, _DONE = 2, 3
_TABLE, _SET, _ELEMENTS = 1, 2, 3
_KEY, _VALUE = 1, 1


def keys(family: str, table: str, name: str) -> list[bytes]:
    """Of the set in the calling thread's network namespace; none if there is no such set. OSError if it is refused."""
    body = struct.pack("!BBH", _FAMILIES[family], 0, 0)
    body += rtattr.attributes((_TABLE, rtattr.text(table)), (_SET, rtattr.text(name)))
    found: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as sock:
        sock.sendto(_HEADER.pack(_HEADER.size + len(body), _GETSETELEM, _REQUEST_DUMP, 1, 0) + body, (0, 0))
        while True:
            data, offset = sock.recv(1 << 18), 0
            while offset < len(data):
                length, type_, _, _, _ = _HEADER.unpack_from(data, offset)
                payload = data[offset + _HEADER.size : offset + length]
                if type_ in (_ERROR, _DONE):
                    code = -int(struct.unpack_from("=i", payload)[0])
                    if code not in (0, errno.ENOENT):
                        raise OSError(code, os.strerror(code), f"set {name}")
                    return found
                listed = rtattr.parse(payload[4:]).get(_ELEMENTS, b"")
                found += (rtattr.parse(rtattr.parse(each)[_KEY])[_VALUE] for each in _list(listed))
                offset += -(-length // 4) * 4


def _list(data: bytes) -> Iterator[bytes]:
    """The values of attributes that all have the same type."""
    offset = 0
    while offset < len(data):
        length, _ = _ATTRIBUTE.unpack_from(data, offset)
        yield data[offset + 4 : offset + length]
        offset += -(-length // 4) * 4
