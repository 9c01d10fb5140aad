"""A limit on the neighbours that an instance makes the kernel resolve: rules in its own network namespace.

All namespaces of a host share the kernel's neighbour tables (arp(7), gc_thresh3), and an entry that waits for a reply
can't be evicted. Before a packet makes an entry, these rules add its next hop to a set of limited size. When the set is
full, packets to other next hops are dropped, and send(2) fails with EPERM. The gateway has a permanent entry, and
entries of multicast groups can be evicted, so neither is counted. A next hop leaves the set 10 s after its last packet.

A bridge has at most 1,023 ports, so the set has room for all of them: one IPv4 and two IPv6 addresses each. A process
with CAP_NET_ADMIN in the namespace can remove the rules.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from insula.kernel.netlink import Request
from insula.kernel.netlink.nftables import FIRST_GENERATION, NftablesSocket
from insula.kernel.netns import call_in_new
from insula.kernel.nftables import Nft
from insula.network.linux import naming

MOST4: Final = naming.MAX_PORTS
MOST6: Final = 2 * naming.MAX_PORTS
SECONDS: Final = 10

_RULES = """
table inet {table} {{
    set ipv4 {{
        typeof rt ip nexthop; size {most4}; flags dynamic,timeout; timeout {seconds}s; gc-interval {seconds}s;
    }}
    set ipv6 {{
        typeof rt ip6 nexthop; size {most6}; flags dynamic,timeout; timeout {seconds}s; gc-interval {seconds}s;
    }}
    chain postrouting {{
        type filter hook postrouting priority 0; policy accept;
        oifname != "{device}" accept
        {gateways}
        ip daddr 224.0.0.0/4 accept
        ip6 daddr ff00::/8 accept
        update @ipv4 {{ rt ip nexthop }} accept
        update @ipv6 {{ rt ip6 nexthop }} accept
        drop
    }}
}}
"""


def bound(table: str, device: str, gateways: Sequence[str]) -> None:
    """Install the rules in the calling thread's network namespace if it never had any rules.

    `device` leads to the gateways. An instance that has run may have any number of rules of its own, so they are not
    read. OSError.
    """
    with NftablesSocket() as nftables:
        if nftables.generation() == FIRST_GENERATION:
            nftables.transact(*_requests(table, device, tuple(gateways)))


@functools.lru_cache(maxsize=256)
def _requests(table: str, device: str, gateways: tuple[str, ...]) -> Sequence[Request]:
    """Return the rules as requests: libnftables installs them in a new namespace, and they are recorded there."""

    def recorded() -> Sequence[Request]:
        with Nft() as nft, NftablesSocket() as nftables:
            nft.run(text(table, device, gateways))
            return nftables.recorded()

    return call_in_new(recorded)


def text(table: str, device: str, gateways: Sequence[str]) -> str:
    """Return the rules as text."""
    known = (f"rt {'ip6' if ':' in gateway else 'ip'} nexthop {gateway} accept" for gateway in gateways)
    return _RULES.format(
        table=table, device=device, most4=MOST4, most6=MOST6, seconds=SECONDS, gateways="\n        ".join(known)
    )
