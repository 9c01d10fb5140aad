"""A limit on the neighbours that an instance makes the kernel resolve: rules in its own network namespace.

All namespaces of a host share the kernel's neighbour tables (arp(7), gc_thresh3), and an entry that waits for a reply
can't be evicted. Before a packet makes an entry, these rules add its next hop to a set of limited size. When the set is
full, packets to other next hops are dropped, and send(2) fails with EPERM. Gateways have permanent entries, and
entries of multicast groups can be evicted, so neither are counted. A next hop leaves the set 10 s after its last
packet.

A bridge has at most 1,023 ports, so the set has room for all of them: one IPv4 and two IPv6 addresses each. An instance
with several ports has the same room for all of them together. A process with CAP_NET_ADMIN in the namespace can remove
the rules. The host's tables are made large enough for all tenants (`enlarge_tables`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from insula.kernel.netlink import Request
from insula.kernel.netlink.nftables import FIRST_GENERATION, NftablesSocket, add_elements, delete_elements
from insula.kernel.netns import call_in_new
from insula.kernel.nftables import Nft
from insula.network.linux import naming
from insula.network.linux.sysctl import HostSettings

MOST4: Final = naming.MAX_PORTS
MOST6: Final = 2 * naming.MAX_PORTS
_TABLES = ("ipv4/neigh/default/gc_thresh", "ipv6/neigh/default/gc_thresh")
_LEAST, _MOST = 1 << 16, 1 << 18  # entries of the neighbour tables
_MEMORY_PER_ENTRY = 1 << 16  # bytes of the host's memory
SECONDS: Final = 10

_SETS: Final = {"gateways4": ".", "gateways6": ":"}
DEVICES: Final = "eth*"  # of ports, inside
_RULES = """
table inet {table} {{
    set gateways4 {{ typeof rt ip nexthop; }}
    set gateways6 {{ typeof rt ip6 nexthop; }}
    set ipv4 {{
        typeof rt ip nexthop; size {most4}; flags dynamic,timeout; timeout {seconds}s; gc-interval {seconds}s;
    }}
    set ipv6 {{
        typeof rt ip6 nexthop; size {most6}; flags dynamic,timeout; timeout {seconds}s; gc-interval {seconds}s;
    }}
    chain postrouting {{
        type filter hook postrouting priority 0; policy accept;
        oifname != "{devices}" accept
        rt ip nexthop @gateways4 accept
        rt ip6 nexthop @gateways6 accept
        ip daddr 224.0.0.0/4 accept
        ip6 daddr ff00::/8 accept
        update @ipv4 {{ rt ip nexthop }} accept
        update @ipv6 {{ rt ip6 nexthop }} accept
        drop
    }}
}}
"""


def bound(table: str, gateways: Sequence[str]) -> bool:
    """Install the rules in the calling thread's network namespace if it never had any rules, and add these gateways to
    their sets. Returns whether the namespace was new. OSError.

    An instance that has run may have any number of rules of its own, so they are not read; it may have removed ours.
    """
    with NftablesSocket() as nftables:
        elements = _elements(add_elements, table, gateways)
        if nftables.generation() == FIRST_GENERATION:
            nftables.transact(*_requests(table), *elements)
            return True
        with contextlib.suppress(OSError):
            nftables.transact(*elements)
        return False


def release(table: str, gateways: Sequence[str]) -> None:
    """Remove gateways of a port from the sets of the calling thread's namespace; nothing happens without these."""
    with NftablesSocket() as nftables, contextlib.suppress(OSError):
        nftables.transact(*_elements(add_elements, table, gateways), *_elements(delete_elements, table, gateways))


def _elements(
    change: Callable[[str, str, str, Iterable[bytes]], Iterable[Request]], table: str, gateways: Sequence[str]
) -> list[Request]:
    keys = {name: [_packed(each) for each in gateways if sign in each] for name, sign in _SETS.items()}
    return [request for name, some in keys.items() for request in change("inet", table, name, some)]


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


@functools.cache
def _requests(table: str) -> Sequence[Request]:
    """Return the rules as requests: libnftables installs them in a new namespace, and they are recorded there."""

    def recorded() -> Sequence[Request]:
        with Nft() as nft, NftablesSocket() as nftables:
            nft.run(text(table))
            return nftables.recorded()

    return call_in_new(recorded)


def text(table: str) -> str:
    """Return the rules as text."""
    return _RULES.format(table=table, devices=DEVICES, most4=MOST4, most6=MOST6, seconds=SECONDS)


def enlarge_tables(settings: HostSettings) -> None:
    """Enlarge the host's neighbour tables, which all namespaces share (`tenant.RETRANSMIT`), as its memory allows."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hard = min(max(memory // _MEMORY_PER_ENTRY, _LEAST), _MOST)
    for name in _TABLES:
        settings.at_least(f"{name}3", hard)
        settings.at_least(f"{name}2", hard // 4)
