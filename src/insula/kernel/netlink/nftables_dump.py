"""Dump the keys of nftables sets as bytes, through the nftables netlink family (NFT_MSG_GETSETELEM).

libnftables lists sets with types, as text, and takes 0.1 ms for each element. Raw keys are enough to find elements that
should not be in a set. The parts of a concatenation follow each other, each padded to four bytes; the name of a device
is padded to 16 (include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h).
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from insula.kernel.netlink import attributes
from insula.kernel.netlink.socket import NetlinkError, NetlinkSocket

IFNAME: Final = 16
_FAMILIES: Final = {"inet": 1, "ip": 2, "bridge": 7, "ip6": 10}
_NETLINK_NETFILTER: Final = 12
_GETSETELEM: Final = 10 << 8 | 13
_GETGEN: Final = 10 << 8 | 16
FIRST_GENERATION: Final = 1
"""The generation of a network namespace whose rules were never changed."""
_TABLE, _SET, _ELEMENTS = 1, 2, 3
_KEY, _VALUE = 1, 1
_GENERATION = 1


def generation() -> int:
    """Return the generation of the calling thread's network namespace, which every transaction of rules increases."""
    with NetlinkSocket(_NETLINK_NETFILTER) as sock:
        answer = sock.get(_GETGEN, struct.pack("!BBH", 0, 0, 0))
    return int.from_bytes(attributes.parse(answer[4:])[_GENERATION], "big")


def keys(family: str, table: str, name: str) -> list[bytes]:
    """Return the keys of a set in the calling thread's network namespace; none if it is missing. NetlinkError."""
    request = struct.pack("!BBH", _FAMILIES[family], 0, 0)
    request += attributes.attributes((_TABLE, attributes.text(table)), (_SET, attributes.text(name)))
    with NetlinkSocket(_NETLINK_NETFILTER) as sock:
        try:
            answers = sock.dump(_GETSETELEM, request)
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return []
            raise
    found: list[bytes] = []
    for body in answers:
        listed = attributes.parse(body[4:]).get(_ELEMENTS, b"")
        elements = (attributes.parse(element) for _, element in attributes.pairs(listed))
        found += (attributes.parse(element[_KEY])[_VALUE] for element in elements)
    return found
