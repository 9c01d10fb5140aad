"""The flows that chains of policies in audit count: elements of sets, with a counter each."""

from __future__ import annotations

from collections.abc import Iterable
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final

from insula.kernel.netlink import Request
from insula.kernel.netlink.nftables import NftablesSocket, delete_elements
from insula.network.fabric import CountedFlow
from insula.network.linux.policy.compiler import DIRECTIONS
from insula.network.linux.policy.port_sets import PROTOCOLS

_NAMES: Final = {number: name for name, number in PROTOCOLS.items()}
_LENGTHS: Final = {4: (4, AF_INET), 6: (16, AF_INET6)}


def read(nftables: NftablesSocket, table: str) -> list[CountedFlow]:
    """Return all flows that were counted. NetlinkError."""
    found = []
    for direction in DIRECTIONS:
        for version, (length, family) in _LENGTHS.items():
            for key, counter in nftables.counters("inet", table, f"audited{version}_{direction}").items():
                source, destination = (inet_ntop(family, key[at : at + length]) for at in (0, length))
                protocol, port = key[2 * length], int.from_bytes(key[2 * length + 4 : 2 * length + 6], "big")
                name = _NAMES.get(protocol, str(protocol))
                port = port >> 8 if name.startswith("icmp") else port
                found.append(CountedFlow(direction, source, destination, name, port, counter.packets))
    return found


def forget(nftables: NftablesSocket, table: str, addresses: Iterable[str]) -> list[Request]:
    """Return requests that delete the flows of these addresses. NetlinkError."""
    requests: list[Request] = []
    gone = {inet_pton(AF_INET6 if ":" in each else AF_INET, each) for each in addresses}
    for direction in DIRECTIONS:
        for version, (length, _) in _LENGTHS.items():
            name = f"audited{version}_{direction}"
            keys = nftables.keys("inet", table, name)
            ends = [key for key in keys if {key[:length], key[length : 2 * length]} & gone]
            requests += delete_elements("inet", table, name, ends)
    return requests
