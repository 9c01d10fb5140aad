"""The packet filter: rules that never change, over sets whose elements come and go with networks and ports.

Three tables. In a tenant's namespace one of the `bridge` family decides what an instance may send: frames from its
own MAC address, and in them only its own IP addresses, also where ARP and NDP claim addresses; no router
advertisements, no DHCP answers; and no reports of who listens to which group (RFC 3376, RFC 3810): our bridges
send what is for a group to all, so nobody needs these, and each start would cost a packet to every instance. The one
of the `inet` family decides what the tenant's router does: answer pings and names at its gateways, forward to
the uplink and statefully back, nothing between two networks. The table in the host's namespace keeps tenants apart from
each other and from the host. Everything not accepted is dropped.

Neither router nor host reports to an instance that a probe of `insula verify` could not be delivered: the report would
quote the address of somebody else's instance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from ipaddress import IPv6Address
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from types import MappingProxyType
from typing import Final

from insula.kernel.netlink.nftables_dump import IFNAME
from insula.kernel.netns import call_in_new
from insula.kernel.nftables import Nft
from insula.model.objects import Network, Port
from insula.network.addresses import link_local
from insula.network.linux import naming
from insula.network.linux.naming import Naming
from insula.network.packets import DSCP

CONNECTIONS: Final = 16384  # that a tenant may have to the outside: conntrack counts them against a limit of the host's
QUESTIONS: Final = 2000  # to the tenant's resolver, a second: its time is the host's
CALLS: Final = 50  # to it over TCP, a second: each costs a process

Elements = Mapping[str, Iterable[tuple[str, ...]]]
"""What is in which set; the set's name is "family set"."""

_ERRORS: Final = f"""\
icmp type {{ destination-unreachable, time-exceeded }} @th,72,8 & 0xfc == {DSCP << 2:#x} drop
        icmpv6 type {{ destination-unreachable, time-exceeded }} @th,64,16 & 0xfc0 == {DSCP << 6:#x} drop"""
"""Drops ICMP errors about probes, which quote the probe's header (RFC 792, RFC 4443) and its DSCP in it."""

_TENANT = """
table bridge {table} {{
    set macs {{ typeof iifname . ether saddr; }}
    set ipv4 {{ typeof iifname . ether saddr . ip saddr; }}
    set ipv6 {{ typeof iifname . ether saddr . ip6 saddr; }}
    set ndp {{ typeof iifname . ether saddr . @th,64,128; }}

    chain prerouting {{
        type filter hook prerouting priority -200; policy drop;
        iifname . ether saddr != @macs drop
        ether type arp goto from_arp
        ether type ip goto from_ipv4
        ether type ip6 goto from_ipv6
    }}
    chain from_arp {{
        arp htype != 1 drop
        arp ptype != ip drop
        iifname . arp saddr ether . arp saddr ip @ipv4 accept
        arp operation request arp saddr ip 0.0.0.0 iifname . arp saddr ether @macs accept comment "probe, RFC 5227"
        drop
    }}
    chain from_ipv4 {{
        udp sport 67 drop comment "DHCP server"
        ip protocol igmp drop
        iifname . ether saddr . ip saddr @ipv4 accept
        drop
    }}
    chain from_ipv6 {{
        meta l4proto {{ {protocols6} }} goto from_known_ipv6
        drop comment "headers, or a fragment, that hide what is behind"
    }}
    chain whole_headers {{
        @th,56,8 < 0x80 return comment "of a first fragment; else a later one has what is not looked at, RFC 7112"
        @th,56,8 >= 0x80 return
        drop
    }}
    chain from_known_ipv6 {{
        frag frag-off 0 jump whole_headers
        exthdr frag exists icmpv6 type 133-137 drop comment "neighbor discovery in fragments, RFC 6980"
        icmpv6 type {{ nd-router-advert, nd-redirect }} drop
        icmpv6 type {{ mld-listener-report, mld-listener-done, mld2-listener-report }} drop
        udp sport 547 drop comment "DHCPv6 server"
        icmpv6 type nd-neighbor-advert iifname . ether saddr . @th,64,128 != @ndp drop
        iifname . ether saddr . ip6 saddr @ipv6 accept
        ip6 saddr :: icmpv6 type nd-neighbor-solicit iifname . ether saddr . @th,64,128 @ndp accept comment "DAD"
        drop
    }}
}}
table inet {table} {{
    set bridges {{ typeof iifname; }}
    set same {{ typeof iifname . oifname; }}
    set gateways4 {{ typeof iifname . ip daddr; }}
    set gateways6 {{ typeof iifname . ip6 daddr; }}

    chain input {{
        type filter hook input priority 0; policy drop;
        iifname "lo" accept
        iifname @bridges udp dport 53 limit rate over {questions}/second burst {questions} packets drop
        ct state established,related accept
        iifname @bridges icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        iifname . ip daddr @gateways4 goto services
        iifname . ip6 daddr @gateways6 goto services
    }}
    chain services {{
        icmp type echo-request accept
        icmpv6 type echo-request accept
        udp dport 53 accept
        tcp dport 53 ct state new limit rate over {calls}/second burst {calls} packets drop
        tcp dport 53 accept
        drop
    }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        iifname . oifname @same accept comment "bridged, where br_netfilter shows it to us"
        ct state established,related accept
        ct state invalid drop
        ct state new ct count over {connections} drop comment "the host's table for connections is everybody's"
        iifname @bridges oifname "{uplink}" accept
    }}
    chain output {{
        type filter hook output priority 0; policy accept;
        {errors}
    }}
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        oifname "{uplink}" masquerade
    }}
}}
"""

_HOST = """
table inet {table} {{
    chain input {{
        type filter hook input priority -5; policy accept;
        iifname "{uplinks}*" goto to_host
    }}
    chain to_host {{
        ct state established,related accept
        drop
    }}
    chain forward {{
        type filter hook forward priority -5; policy accept;
        iifname "{uplinks}*" goto from_tenant
        oifname "{uplinks}*" goto to_tenant
        {closed}
    }}
    chain prerouting {{
        type nat hook prerouting priority -100; policy accept;
        {questions}
    }}
    chain from_tenant {{
        oifname "{uplinks}*" drop
        fib saddr . iif oif missing drop
        ct status dnat ct original ip daddr {range4} th dport 53 accept
        ct status dnat ct original ip6 daddr {range6} th dport 53 accept
        ip daddr {{ {range4}, 169.254.0.0/16, 192.0.2.0/24 }} drop
        ip daddr {{ {metadata4} }} drop
        ip6 daddr {{ {range6}, 2001:db8::/32, fe80::/10 }} drop
        ip6 daddr {{ {metadata6} }} drop
        ip dscp {dscp} drop
        ip6 dscp {dscp} drop
        accept
    }}
    chain to_tenant {{
        ct state established,related accept
        drop
    }}
    chain output {{
        type filter hook output priority -5; policy accept;
        oifname "{uplinks}*" goto errors
    }}
    chain errors {{
        {errors}
    }}
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        iifname "{uplinks}*" oifname != "{uplinks}*" masquerade
    }}
}}
"""


PROTOCOLS6: Final = "tcp, udp, icmpv6, sctp, dccp, udplite, gre, esp, 4, 41, 89, 103, 112, 115"
"""What an instance may send in IPv6. Authentication headers (51) are not among these: they hide what is behind them."""

METADATA4: Final = ("168.63.129.16", "100.100.100.200", "192.0.0.192")
METADATA6: Final = ("fd00:ec2::/32", "fd20:ce::254")
"""Where clouds tell their machines secrets, beside link-local addresses: Azure, Alibaba, Oracle; AWS, Google."""

FIRST_QUESTION_PORT: Final = 5300  # of the host's end of an uplink: what comes there goes to the host's name servers


def tenant_rules(table: str) -> str:
    """The static part of both tables in a tenant's namespace."""
    return _TENANT.format(
        table=table,
        uplink=naming.UPLINK,
        connections=CONNECTIONS,
        questions=QUESTIONS,
        calls=CALLS,
        protocols6=PROTOCOLS6,
        errors=_ERRORS,
    )


def host_rules(
    names: Naming, servers: Sequence[str] = (), closed: Mapping[int, Sequence[str]] = MappingProxyType({})
) -> str:
    """The table in the host's namespace.

    Uplinks' addresses are nobody's outside, and at link-local and some other ones a cloud tells its machine, the host,
    secrets: nothing is sent to either. `servers` are the name servers that tenants' resolvers are led to: they ask the
    host's end of their uplink, so it doesn't matter which addresses their networks have. Between the devices in
    `closed`, by IP version, nothing is forwarded: the host did not do so before.
    """
    return _HOST.format(
        table=names.prefix,
        uplinks=names.uplinks,
        range4=names.range4,
        range6=names.range6,
        metadata4=", ".join(METADATA4),
        metadata6=", ".join(METADATA6),
        dscp=DSCP,
        errors=_ERRORS,
        questions="\n        ".join(_question(names, number, server) for number, server in enumerate(servers)),
        closed="\n        ".join(_closed(version, devices) for version, devices in closed.items() if devices),
    )


def _question(names: Naming, number: int, server: str) -> str:
    ip, range_, to = ("ip6", names.range6, f"[{server}]") if ":" in server else ("ip", names.range4, server)
    asked = f'iifname "{names.uplinks}*" {ip} daddr {range_} meta l4proto {{ tcp, udp }}'
    return f"{asked} th dport {FIRST_QUESTION_PORT + number} dnat {ip} to {to}:53"


def _closed(version: int, devices: Sequence[str]) -> str:
    names = ", ".join(f'"{device}"' for device in devices)
    return f"meta nfproto ipv{version} iifname {{ {names} }} oifname {{ {names} }} drop"


def install(nft: Nft, table: str, families: Iterable[str], rules: str) -> None:
    """Load rules where they are missing or differ from `rules`; the sets keep their elements. One transaction."""
    wanted = as_listed(rules, table)
    if all(nft.rules(family, table) == wanted[family] for family in families):
        return
    flush = "".join(f"add table {family} {table}\nflush table {family} {table}\n" for family in families)
    try:
        nft.run(flush + rules)
    except OSError:  # a set or chain of another version stands in the way
        replace = "".join(f"add table {family} {table}\ndelete table {family} {table}\n" for family in families)
        nft.run(replace + rules)


@cache
def as_listed(rules: str, table: str) -> dict[str, str]:
    """`rules` as nft prints them when they are installed, by family: made by installing them where nobody is."""

    def listed() -> dict[str, str]:
        with Nft() as nft:
            nft.run(rules)
            return {family: nft.rules(family, table) for family, _ in nft.tables()}

    return call_in_new(listed)


# -- elements ------------------------------------------------------------------------------------------------------


_TYPES: Final = {
    "bridge macs": "dm",
    "bridge ipv4": "dm4",
    "bridge ipv6": "dm6",
    "bridge ndp": "dmh",
    "inet bridges": "d",
    "inet same": "dd",
    "inet gateways4": "d4",
    "inet gateways6": "d6",
}
"""The types of the parts of a set's elements: device, MAC, IPv4 and IPv6 address, 16 bytes in hexadecimal."""
SETS: Final = tuple(_TYPES)
"""All sets, by "family set"."""


def of_network(network: Network) -> dict[str, list[tuple[str, ...]]]:
    """The elements that a network adds."""
    device = naming.bridge(network.index)
    return {
        "inet bridges": [(device,)],
        "inet same": [(device, device)],
        "inet gateways4": [(device, network.gateway)],
        "inet gateways6": [(device, network.gateway6)] if network.gateway6 else [],
    }


def of_port(port: Port) -> dict[str, list[tuple[str, ...]]]:
    """The elements that a port adds: what it may send from."""
    device, mac = naming.port(port.index), port.mac
    six = [port.address6, link_local(mac)] if port.address6 else []
    return {
        "bridge macs": [(device, mac)],
        "bridge ipv4": [(device, mac, port.address)],
        "bridge ipv6": [(device, mac, address) for address in six],
        "bridge ndp": [(device, mac, f"0x{int(IPv6Address(address)):032x}") for address in six],
    }


def add(table: str, elements: Elements) -> str:
    """The commands that add elements; those that are there already stay."""
    return "".join(_command("add", table, name, some) for name, some in elements.items())


def delete(table: str, elements: Elements) -> str:
    """The commands that delete elements; no error where they aren't: they are added first, in the same transaction."""
    return add(table, elements) + "".join(_command("delete", table, name, some) for name, some in elements.items())


def key(name: str, element: tuple[str, ...]) -> bytes:
    """An element as the kernel has it (`nftables_dump`). `name` is the set's."""
    return b"".join(_packed(kind, part) for kind, part in zip(_TYPES[name], element, strict=True))


def element(name: str, packed: bytes) -> tuple[str, ...]:
    """The element of a key."""
    found, at = [], 0
    for kind in _TYPES[name]:
        found.append(_text(kind, packed[at : at + _LENGTHS[kind]]))
        at += _LENGTHS[kind]
    return tuple(found)


_LENGTHS: Final = {"d": IFNAME, "m": 8, "4": 4, "6": 16, "h": 16}


def _packed(kind: str, part: str) -> bytes:
    if kind == "d":
        return part.encode().ljust(IFNAME, b"\0")
    if kind == "m":
        return bytes.fromhex(part.replace(":", "")) + b"\0\0"
    if kind == "h":
        return int(part, 16).to_bytes(16, "big")
    return inet_pton(AF_INET if kind == "4" else AF_INET6, part)


def _text(kind: str, packed: bytes) -> str:
    if kind == "d":
        return packed.rstrip(b"\0").decode(errors="replace")
    if kind == "m":
        return packed[:6].hex(":")
    if kind == "h":
        return f"0x{packed.hex()}"
    return inet_ntop(AF_INET if kind == "4" else AF_INET6, packed)


def _command(verb: str, table: str, name: str, elements: Iterable[tuple[str, ...]]) -> str:
    family, _, set_ = name.partition(" ")
    kinds = _TYPES[name]
    written = ", ".join(
        " . ".join(f'"{part}"' if kind == "d" else part for kind, part in zip(kinds, each, strict=True))
        for each in elements
    )
    return f"{verb} element {family} {table} {set_} {{ {written} }}\n" if written else ""
