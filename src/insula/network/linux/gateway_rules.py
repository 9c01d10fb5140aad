"""Rules of a tenant's gateways, beside those of `linux.rules`: segments, guests, and queries of closed networks.

Networks have different MTUs, and not every end takes notice of ICMP errors. So the maximum segment size in TCP's first
packets is lowered to what fits on the way there and back.

Queries from networks without a way out are translated to a resolver that asks nobody (`linux.resolvers`). Only those to
the gateway are: others are for name servers of the tenant.
"""

from __future__ import annotations

from typing import Final

CLOSED_DNS_PORT: Final = 5399  # of the resolver for networks without a way out
ASKS: Final = 200  # messages a second of a tenant's guests (`linux.guests`): insulad answers them

_RULES: Final = """
table inet {table} {{
    set closed {{ typeof iifname; }}
    set gateways4 {{ typeof iifname . ip daddr; }}
    set gateways6 {{ typeof iifname . ip6 daddr; }}

    chain guests {{
        limit rate over {asks}/second burst {asks} packets drop
        accept
    }}
    chain closed_dns {{
        type nat hook prerouting priority -100; policy accept;
        iifname @closed iifname . ip daddr @gateways4 meta l4proto {{ tcp, udp }} th dport 53 dnat to :{closed_dns}
        iifname @closed iifname . ip6 daddr @gateways6 meta l4proto {{ tcp, udp }} th dport 53 dnat to :{closed_dns}
    }}
    chain segments {{
        type filter hook postrouting priority -150; policy accept;
        tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
    }}
}}
"""


def text(table: str) -> str:
    """Return the rules as text."""
    return _RULES.format(table=table, asks=ASKS, closed_dns=CLOSED_DNS_PORT)
