"""The rules of egress by name in a tenant's table, a part of `linux.rules`.

DNS queries of instances in `named4` and `named6` are translated to the gate (`insula.network.names`), whichever server
they are for. So are their connections to what is in `checked4` and `checked6`. Both is decided at the first packet of a
connection, in a chain of type nat: other packets don't pass it. Elements of the other sets are leases: where policies
have found nothing that allows a connection, they jump to `by_name`, which grants it if there is one.

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

_SETS: Final = """
    set named4 { type ipv4_addr; }
    set named6 { type ipv6_addr; }
    set leases4 { type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags timeout; }
    set leases6 { type ipv6_addr . ipv6_addr . inet_proto . inet_service; flags timeout; }
    set lease_protocols4 { type ipv4_addr . ipv4_addr . inet_proto; flags timeout; }
    set lease_protocols6 { type ipv6_addr . ipv6_addr . inet_proto; flags timeout; }
    set checked4 { type ipv4_addr . ipv4_addr . inet_service; flags timeout; }
    set checked6 { type ipv6_addr . ipv6_addr . inet_service; flags timeout; }
"""
_CHAINS: Final = f"""
    chain names_redirect {{
        type nat hook prerouting priority -101; policy accept;
        iifname @bridges ip saddr @named4 goto from_named
        iifname @bridges ip6 saddr @named6 goto from_named
    }}
    chain from_named {{
        meta nfproto ipv4 meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {ADDRESS4}:{DNS_PORT}
        meta nfproto ipv6 meta l4proto {{ tcp, udp }} th dport 53 dnat ip6 to [{ADDRESS6}]:{DNS_PORT}
        ip saddr . ip daddr . tcp dport @checked4 dnat ip to {ADDRESS4}:{PROXY_PORT}
        ip6 saddr . ip6 daddr . tcp dport @checked6 dnat ip6 to [{ADDRESS6}]:{PROXY_PORT}
    }}
    chain to_gate {{
        udp dport {DNS_PORT} update @queries4 {{ ip saddr ASKED }} drop
        udp dport {DNS_PORT} update @queries6 {{ ip6 saddr ASKED }} drop
        udp dport {DNS_PORT} limit rate over {QUERIES}/second burst {QUERIES} packets drop
        meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept
        tcp dport {PROXY_PORT} accept
        drop
    }}
    chain by_name {{
        ct original ip saddr @named4 goto leased4
        ct original ip6 saddr @named6 goto leased6
    }}
    chain leased4 {{
        meta l4proto {{ tcp, udp }} TUPLE4 . meta l4proto . ct reply proto-src @leases4 goto grant
        meta l4proto udp ct reply proto-src {{ {CLOSED} }} return
        meta l4proto tcp ct reply proto-src 853 return
        TUPLE4 . meta l4proto @lease_protocols4 goto grant
    }}
    chain leased6 {{
        meta l4proto {{ tcp, udp }} TUPLE6 . meta l4proto . ct reply proto-src @leases6 goto grant
        meta l4proto udp ct reply proto-src {{ {CLOSED} }} return
        meta l4proto tcp ct reply proto-src 853 return
        TUPLE6 . meta l4proto @lease_protocols6 goto grant
    }}
    chain output_of_gate {{
        type filter hook output priority -1; policy accept;
        meta skgid {GROUP} goto from_gate comment "packets of the kernel have no group"
    }}
    chain from_gate {{
        ct state established,related accept
        oifname "lo" meta l4proto {{ tcp, udp }} th dport 53 accept
        oifname "{naming.UPLINK}" meta l4proto {{ tcp, udp }} th dport 5300-5399 accept comment "name servers"
        oifname "{naming.UPLINK}" tcp dport {{ 80, 443 }} accept
        drop
    }}
"""
TO_GATE: Final = f"""\
ip daddr {ADDRESS4} ct status dnat goto to_gate
        ip6 daddr {ADDRESS6} ct status dnat goto to_gate"""
"""Rules of the chain of packets for the router itself."""


def sets() -> str:
    """Return the declarations of all sets."""
    return _SETS


def chains(asked: str) -> str:
    """Return the chains; `grant`, to which they go, is among those of policies. `asked` is the limit
    of an instance's queries."""
    found = _CHAINS.replace("ASKED", asked)
    for version, ip in ((4, "ip"), (6, "ip6")):
        found = found.replace(f"TUPLE{version}", f"ct original {ip} saddr . ct reply {ip} saddr")
    return found
