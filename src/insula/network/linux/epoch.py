"""The epoch of a tenant's rules: how a change reaches connections that are open already.

A stateful filter judges the first packet of a connection, and lets the others pass because connection tracking knows
them (nf_conntrack). So a rule that is taken back has no effect on open connections. Here an accepted connection is
marked with the number of the present epoch (`ct mark`, map `epoch`), and only connections with this number pass without
being judged (set `judged`). Whoever takes something back commits the next epoch in the same transaction. Then each open
connection is judged once more at its next packet, whichever direction this has: the rules look at the addresses that
connection tracking has for it, not at those of the packet. A forbidden one ends there; no other loses a packet.

No entry of connection tracking has to be deleted for this. A deleted one would be made again by the next packet of
either end, which may be the wrong one (nf_conntrack_tcp_loose).
"""

from __future__ import annotations

import errno
import sys
from typing import Final

from insula.kernel.netlink import NetlinkError, Request, maps
from insula.kernel.netlink.maps import KeyInterval
from insula.kernel.netlink.nftables import NftablesSocket, add_elements, delete_elements

_FIRST: Final = 1 << 31  # marks of other meanings are smaller
_MASK: Final = _FIRST - 1
_PROTOCOLS: Final = (KeyInterval(b"\x02"), KeyInterval(b"\x0a"))  # NFPROTO_IPV4, NFPROTO_IPV6
_JUDGED, _EPOCH = "judged", "epoch"


class Epoch:
    """The epoch in one tenant's table, as last read or written."""

    def __init__(self, nftables: NftablesSocket, table: str) -> None:
        self._nftables = nftables
        self._table = table
        self._judged: set[bytes] = set()
        self._mapped: set[KeyInterval] = set()

    def is_valid(self) -> bool:
        """Read the epoch from the kernel. Whether it is whole: one number, in both places."""
        self._judged = set(self._nftables.keys("inet", self._table, _JUDGED))
        mapped = maps.read(self._nftables, "inet", self._table, _EPOCH)
        self._mapped = set(mapped)
        return len(self._judged) == 1 and self._mapped == set(_PROTOCOLS) and set(mapped.values()) == self._judged

    def transact(self, *requests: Request) -> None:
        """Carry out requests and begin the next epoch, as one transaction. NetlinkError."""
        try:
            self._begin(requests)
        except NetlinkError as error:
            if error.errno not in (errno.ENOENT, errno.EEXIST):
                raise
            self.is_valid()  # somebody else has changed it
            self._begin(requests)

    def _begin(self, requests: tuple[Request, ...]) -> None:
        mark = _next(max(self._judged, key=_number, default=b""))
        self._nftables.transact(
            *requests,
            *delete_elements("inet", self._table, _JUDGED, self._judged),
            *maps.delete("inet", self._table, _EPOCH, self._mapped),
            *add_elements("inet", self._table, _JUDGED, [mark]),
            *maps.add("inet", self._table, _EPOCH, dict.fromkeys(_PROTOCOLS, mark)),
        )
        self._judged, self._mapped = {mark}, set(_PROTOCOLS)


def _number(mark: bytes) -> int:
    return int.from_bytes(mark, sys.byteorder)


def _next(mark: bytes) -> bytes:
    """Return the mark that follows this one; marks are in the byte order of the host."""
    return (_FIRST | (_number(mark) + 1) & _MASK).to_bytes(4, sys.byteorder)
