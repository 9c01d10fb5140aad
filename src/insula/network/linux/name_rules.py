"""The rules of egress by name in a tenant's table, beside those of `linux.rules`.

DNS queries of instances in `named4` and `named6` are translated to the gate (`insula.network.names`), whichever server
they are for. So are their connections to what is in `checked4` and `checked6`. Both is decided at the first packet of a
connection, in a chain of type nat: other packets don't pass it. Elements of the other sets let connections pass that
policies would forbid: policies jump to `by_name`.

A lease of all ports doesn't open those of encrypted DNS and QUIC, past which nothing could be checked. Who wants them
writes their ports into the rule.
"""

from __future__ import annotations

from typing import Final

from insula.network.linux import naming
from insula.network.names.gate import ADDRESS4, ADDRESS6, DNS_PORT, PROXY_PORT
from insula.network.names.process import GROUP

QUERIES: Final = 2000  # a second over UDP, of all instances of a tenant
CLOSED: Final = "443, 784, 853, 5353, 5355, 8853"
"""UDP ports of QUIC, DNS over QUIC (RFC 9250; earlier drafts: 784, 8853), multicast DNS and LLMNR; 853 of DNS over TLS.
"""

_RULES: Final = """
table inet {table} {{
    set named4 {{ type ipv4_addr; }}
    set named6 {{ type ipv6_addr; }}
    set leases4 {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags timeout; }}
    set leases6 {{ type ipv6_addr . ipv6_addr . inet_proto . inet_service; flags timeout; }}
    set lease_protocols4 {{ type ipv4_addr . ipv4_addr . inet_proto; flags timeout; }}
    set lease_protocols6 {{ type ipv6_addr . ipv6_addr . inet_proto; flags timeout; }}
    set checked4 {{ type ipv4_addr . ipv4_addr . inet_service; flags timeout; }}
    set checked6 {{ type ipv6_addr . ipv6_addr . inet_service; flags timeout; }}

    chain names_redirect {{
        type nat hook prerouting priority -101; policy accept;
        ip saddr @named4 goto from_named
        ip6 saddr @named6 goto from_named
    }}
    chain from_named {{
        meta nfproto ipv4 meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {address4}:{dns}
        meta nfproto ipv6 meta l4proto {{ tcp, udp }} th dport 53 dnat ip6 to [{address6}]:{dns}
        ip saddr . ip daddr . tcp dport @checked4 dnat ip to {address4}:{proxy}
        ip6 saddr . ip6 daddr . tcp dport @checked6 dnat ip6 to [{address6}]:{proxy}
    }}
    chain to_gate {{
        udp dport {dns} limit rate over {queries}/second burst {queries} packets drop
        meta l4proto {{ tcp, udp }} th dport {dns} accept
        tcp dport {proxy} accept
    }}
    chain by_name {{
        ct original ip saddr @named4 goto leased4
        ct original ip6 saddr @named6 goto leased6
    }}
    chain leased4 {{
        meta l4proto {{ tcp, udp }} {tuple4} . meta l4proto . ct reply proto-src @leases4 accept
        jump not_by_protocol
        {tuple4} . meta l4proto @lease_protocols4 accept
    }}
    chain leased6 {{
        meta l4proto {{ tcp, udp }} {tuple6} . meta l4proto . ct reply proto-src @leases6 accept
        jump not_by_protocol
        {tuple6} . meta l4proto @lease_protocols6 accept
    }}
    chain not_by_protocol {{
        meta l4proto udp ct reply proto-src {{ {closed} }} drop
        meta l4proto tcp ct reply proto-src 853 drop
    }}
    chain output_of_gate {{
        type filter hook output priority -1; policy accept;
        meta skgid {group} goto from_gate comment "packets of the kernel have no group"
    }}
    chain from_gate {{
        ct state established,related accept
        oifname "lo" meta l4proto {{ tcp, udp }} th dport 53 accept
        oifname "{uplink}" meta l4proto {{ tcp, udp }} th dport 5300-5399 accept comment "name servers"
        oifname "{uplink}" tcp dport {{ 80, 443 }} accept
        drop
    }}
}}
"""


def name_rules(table: str) -> str:
    """Return the rules of egress by name in a tenant's namespace."""
    return _RULES.format(
        table=table,
        address4=ADDRESS4,
        address6=ADDRESS6,
        dns=DNS_PORT,
        proxy=PROXY_PORT,
        queries=QUERIES,
        closed=CLOSED,
        group=GROUP,
        uplink=naming.UPLINK,
        tuple4="ct original ip saddr . ct reply ip saddr",
        tuple6="ct original ip6 saddr . ct reply ip6 saddr",
    )
