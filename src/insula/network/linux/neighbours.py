"""A bound on the neighbours that an instance can have the kernel look for: rules in its own network namespace.

All namespaces of a host share the kernel's neighbour tables (arp(7), gc_thresh3), and an entry that waits for an answer
can't be taken out of them. Before a packet makes an entry, these rules put its next hop into a set with a size; once
that is full, what is for other next hops is dropped: send(2) says EPERM. The gateway, whose entry is permanent, and
groups, whose entries can be taken out, are not counted. A next hop is forgotten 10 s after the last packet to it.

A bridge has at most 1,023 ports, so all that answer have their place: one IPv4 address each, two of IPv6.
Who has CAP_NET_ADMIN in the namespace can remove the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from insula.kernel.netlink import nftables_dump
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
    """Install the rules in the calling thread's network namespace if nobody has ever changed its rules.

    `device` leads to the gateways. An instance that has run may have rules of its own, without end: none of these is
    read. OSError.
    """
    if nftables_dump.generation() != nftables_dump.FIRST_GENERATION:
        return
    with Nft() as nft:
        nft.run(text(table, device, gateways))


def text(table: str, device: str, gateways: Sequence[str]) -> str:
    """The rules."""
    known = (f"rt {'ip6' if ':' in gateway else 'ip'} nexthop {gateway} accept" for gateway in gateways)
    return _RULES.format(
        table=table, device=device, most4=MOST4, most6=MOST6, seconds=SECONDS, gateways="\n        ".join(known)
    )
