"""The table `bridge` in a tenant's namespace, which filters frames from and to instances.

An instance may send from its own MAC address and its own IP addresses only, also in ARP and NDP messages. Router
advertisements and DHCP replies are dropped. So are reports of multicast membership (RFC 3376, RFC 3810): the bridges
flood multicast frames, so reports have no use, and each start would send one to every instance.

A message that finds a neighbour (ARP, NDP) comes only to the instance that it asks for or tells. It has no option but a
MAC address of its sender, or the nonce of duplicate address detection. To instances that a policy in direction in
selects (set `guarded`) nothing else comes than packets to their own addresses, which the rules of the router judge: no
broadcast and no multicast.
"""

from __future__ import annotations

from typing import Final

GROUP_FRAMES: Final = 100  # a second from a port to broadcast and multicast addresses: each goes to all ports
GROUP_BURST: Final = 2000  # of these at once: an instance may look for all others of its network
FRAGMENTS: Final = 2000  # a second from a port, and at once: the router keeps them until the packet is whole
ARP_LENGTH: Final = 46  # bytes of the largest ARP packet: the padding of the shortest frame included
NDP_LENGTH: Final = 24  # bytes of a neighbor solicitation or advertisement; an option of a MAC address has 8 more
ASKS: Final = 5  # messages of a port a second to the DHCP servers, and router solicitations
PROTOCOLS6: Final = "tcp, udp, icmpv6, sctp, dccp, udplite, gre, esp, 4, 41, 89, 103, 112, 115"
"""The IPv6 protocols that an instance may send. Authentication headers (51) are excluded: they hide the protocol."""

TCP4: Final = (
    "ether type ip ip protocol tcp ip frag-off & 0x3fff == 0 meta pkttype other"
    " iifname . ether saddr . ip saddr @ipv4 goto counted"
)
TCP6: Final = "ether type ip6 ip6 nexthdr tcp meta pkttype other iifname . ether saddr . ip6 saddr @ipv6 goto counted"
"""Most packets: TCP to one receiver. What all other rules ask for holds, so these are spared: `ipv4` and `ipv6` have no
MAC address that `macs` lacks."""

_RULES: Final = """
table bridge {table} {{
    set macs {{ typeof iifname . ether saddr; }}
    set ipv4 {{ typeof iifname . ether saddr . ip saddr; }}
    set ipv6 {{ typeof iifname . ether saddr . ip6 saddr; }}
    set ndp {{ typeof iifname . ether saddr . @th,64,128; }}
    set ndp_macs {{ typeof iifname . @th,208,48; }}
    set ranges4 {{ typeof iifname . ether saddr . ip saddr; flags interval; }}
    set ranges6 {{ typeof iifname . ether saddr . ip6 saddr; flags interval; }}
    set sent {{ typeof iifname; counter; }}
    set received {{ typeof oifname; counter; }}
    set reflected {{ typeof iifname . oifname; }}
    set sought4 {{ typeof oifname . arp daddr ip; }}
    set sought6 {{ typeof oifname . @th,64,128; }}
    set guarded {{ typeof oifname; }}
    set asking {{ typeof iifname; size 65535; flags dynamic,timeout; timeout 10s; }}
    set fragments {{ typeof iifname . ether saddr; size 65535; flags dynamic,timeout; timeout 10s; }}
    set storms {{ typeof iifname; size 65535; flags dynamic,timeout; timeout 1m; }}
    set resolving {{ typeof iifname; size 65535; flags dynamic,timeout; timeout 1m; }}

    chain prerouting {{
        type filter hook prerouting priority -200; policy drop;
        {tcp4}
        {tcp6}
        iifname . ether saddr != @macs drop
        meta pkttype {{ broadcast, multicast }} update @storms {{ iifname {groups} }} drop
        ether type arp goto from_arp
        ether type ip goto from_ipv4
        ether type ip6 goto from_ipv6
    }}
    chain from_arp {{
        arp htype != 1 drop
        arp ptype != ip drop
        meta length > {arp_length} drop comment "more than the padding of the shortest frame"
        update @resolving {{ iifname {groups} }} drop
        iifname . arp saddr ether . arp saddr ip @ipv4 accept
        arp operation request arp saddr ip 0.0.0.0 iifname . arp saddr ether @macs accept comment "probe, RFC 5227"
        drop
    }}
    chain from_ipv4 {{
        ip frag-off & 0x3fff != 0 jump pieces
        udp sport 67 drop comment "DHCP server"
        ip protocol igmp drop
        udp dport 67 jump asks
        ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 goto counted comment "DHCP client"
        iifname . ether saddr . ip saddr @ipv4 goto counted
        iifname . ether saddr . ip saddr @ranges4 goto counted
        drop
    }}
    chain from_ipv6 {{
        meta l4proto {{ {protocols6} }} goto from_known_ipv6
        drop comment "other headers, and fragments, hide the protocol"
    }}
    chain pieces {{
        update @fragments {{ iifname . ether saddr limit rate over {fragments}/second burst {fragments} packets }} drop
    }}
    chain whole_headers {{
        @th,56,8 < 0x80 return comment "the first fragment has all headers, RFC 7112"
        @th,56,8 >= 0x80 return
        drop
    }}
    chain from_known_ipv6 {{
        exthdr frag exists jump pieces
        frag frag-off 0 jump whole_headers
        exthdr frag exists icmpv6 type 133-137 drop comment "neighbor discovery in fragments, RFC 6980"
        icmpv6 type {{ nd-router-advert, nd-redirect }} drop
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} jump neighbor_discovery
        icmpv6 type {{ mld-listener-report, mld-listener-done, mld2-listener-report }} drop
        udp sport 547 drop comment "DHCPv6 server"
        udp dport 547 jump asks
        icmpv6 type nd-router-solicit jump asks
        ip6 saddr :: ip6 daddr ff02::2 icmpv6 type nd-router-solicit goto counted
        icmpv6 type nd-neighbor-advert iifname . ether saddr . @th,64,128 != @ndp drop
        iifname . ether saddr . ip6 saddr @ipv6 goto counted
        iifname . ether saddr . ip6 saddr @ranges6 goto counted
        ip6 saddr :: icmpv6 type nd-neighbor-solicit iifname . ether saddr . @th,64,128 @ndp goto counted comment "DAD"
        drop
    }}
    chain neighbor_discovery {{
        ip6 hoplimit != 255 drop comment "RFC 4861, section 7.1"
        ip6 nexthdr != icmpv6 drop comment "headers before it have room for more"
        update @resolving {{ iifname {groups} }} drop
        ip6 length {ndp_length} return comment "no option"
        ip6 length != {ndp_option} drop
        @th,192,16 {{ 0x0101, 0x0201 }} iifname . @th,208,48 @ndp_macs return comment "the sender's MAC address"
        @th,192,16 0x0e01 ip6 saddr :: return comment "nonce, RFC 7527"
        drop
    }}
    chain asks {{
        update @asking {{ iifname limit rate over {asks}/second burst {asks} packets }} drop
    }}
    chain counted {{
        iifname @sent accept
        accept
    }}
    chain forward {{
        type filter hook forward priority -200; policy accept;
        meta pkttype {{ broadcast, multicast }} iifname . oifname @reflected drop comment "ports are in hairpin mode"
        ether type arp goto resolution
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} goto resolution
        oifname @guarded goto to_guarded
    }}
    chain resolution {{
        oifname . arp daddr ip @sought4 accept
        iifname . arp saddr ether . arp daddr ip @ipv4 accept comment "announcement, RFC 5227"
        oifname . @th,64,128 @sought6 accept
        icmpv6 type nd-neighbor-advert accept comment "about an address of the sender"
        drop
    }}
    chain to_guarded {{
        oifname . ether daddr . ip daddr @ipv4 accept comment "the router's rules judge it"
        oifname . ether daddr . ip daddr @ranges4 accept
        oifname . ether daddr . ip6 daddr @ipv6 accept
        oifname . ether daddr . ip6 daddr @ranges6 accept
        drop
    }}
    chain postrouting {{
        type filter hook postrouting priority 0; policy accept;
        ether type {{ ip, ip6 }} oifname @received accept
    }}
}}
"""


def text(table: str) -> str:
    """Return the rules."""
    return _RULES.format(
        table=table,
        tcp4=TCP4,
        tcp6=TCP6,
        groups=f"limit rate over {GROUP_FRAMES}/second burst {GROUP_BURST} packets",
        asks=ASKS,
        fragments=FRAGMENTS,
        arp_length=ARP_LENGTH,
        ndp_length=NDP_LENGTH,
        ndp_option=NDP_LENGTH + 8,
        protocols6=PROTOCOLS6,
    )
