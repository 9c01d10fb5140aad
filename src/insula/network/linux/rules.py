"""The packet filter: static nftables rules over sets, whose elements are added and removed with networks and ports.

There are three tables. Packets from and to tenants that no rule accepts are dropped.

- The `bridge` table in a tenant's namespace filters frames from and to instances: see `bridge_rules`.
- The `inet` table in a tenant's namespace is that of its router. It answers pings and DNS at its gateways, and judges
  connections: those that are routed, and with br_netfilter those between two instances of one network. The set `paths`
  has pairs of devices between which a connection may be opened, and the map `routers` and the set `joined` have the
  networks of each router, between which it may as well (routing.py). `epoch.py` tells how changes reach open
  connections. Namespaces of `linux.egress` have DNS and the uplink as well. What they send and receive is counted at
  their devices.
- The table in the host's namespace isolates tenants from each other and from the host: see `host_rules`.

ICMP errors about probes of `insula verify` are dropped in router and host, because such an error quotes the probe and
with it the address of another tenant's instance.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from ipaddress import IPv6Address
from typing import Final

from insula.kernel.netlink import Request, maps
from insula.kernel.netlink.maps import KeyInterval
from insula.kernel.netlink.nftables import NftablesSocket, add_elements, delete_elements
from insula.kernel.netns import call_in_new
from insula.kernel.nftables import Nft
from insula.model.objects import Network, Port
from insula.network.addresses import gateway_mac, link_local
from insula.network.intent import RemotePort
from insula.network.linux import bridge_rules, connection_limits, gateway_rules, keys, name_rules, naming, pairs
from insula.network.linux.policy import chains as policy
from insula.network.packets import DSCP

CONNECTIONS: Final = 16384  # of a tenant to the outside, whose table is the host's; of a peer to a tenant, in its table
CONNECTIONS_EACH: Final = 8192  # of an address of an instance to anywhere, and of all its addresses to the outside
DNS_QUERIES_EACH: Final = 500  # a second over UDP from one address
DNS_QUERIES: Final = 2000  # a second over UDP to the tenant's resolver, which uses the host's processors
DNS_CONNECTIONS: Final = 50  # a second over TCP: the resolver forks a process for each

_LIMITS: Final = {
    "connections4": "ip saddr",
    "connections6": "ip6 saddr",
    "leaving": "iifname . ether saddr",
    "visiting": "iifname",
    "arriving": "iifname",
    "outgoing": "oifname",
    "egress_opened": "oifname",
}
"""The key of each limit of connections."""

Elements = Mapping[str, Iterable[tuple[str, ...]]]
"""Elements by set; the set's name is "family set"."""
Keys = Mapping[str, Iterable[bytes]]
"""The same as the kernel's keys."""

ERRORS: Final = f"""\
icmp type {{ destination-unreachable, time-exceeded }} @th,72,8 & 0xfc == {DSCP << 2:#x} drop
        icmpv6 type {{ destination-unreachable, time-exceeded }} @th,64,16 & 0xfc0 == {DSCP << 6:#x} drop"""
"""Rules that drop ICMP errors about probes. An error quotes the packet's header (RFC 792, RFC 4443), with its DSCP."""

_TENANT = """
table inet {table} {{
    set bridges {{ typeof iifname; }}
    set paths {{ typeof iifname . oifname; }}
    map routers {{ type ifname : mark; }}
    set joined {{ type ifname . mark; }}
    set judged {{ type mark; }}
    map epoch {{ type nf_proto : mark; }}
    {limit_sets}
    set endpoints4 {{ typeof iifname . ip daddr; }}
    set endpoints6 {{ typeof iifname . ip6 daddr; }}
    set queries4 {{ type ipv4_addr; size 65535; flags dynamic,timeout; timeout 1m; }}
    set queries6 {{ type ipv6_addr; size 65535; flags dynamic,timeout; timeout 1m; }}
    set external4 {{ typeof ip daddr; }}
    set external6 {{ typeof ip6 daddr; }}
    set routed4 {{ type ipv4_addr . mark; }}
    set routed6 {{ type ipv6_addr . mark; }}
    set peer_protocols {{ type ifname . inet_proto; }}
    set peer_ports {{ type ifname . inet_proto . inet_service; }}
    set visitors4 {{ typeof iifname . ip saddr; }}
    set visitors6 {{ typeof iifname . ip6 saddr; }}
    set egress_sent {{ typeof meta nfproto; counter; }}
    set egress_received {{ typeof meta nfproto; counter; }}
    {policy_sets}
    {name_sets}

    chain from_egress {{
        type filter hook prerouting priority 0; policy accept;
        iifname "{egress}*" meta nfproto @egress_sent accept
    }}
    chain to_egress {{
        type filter hook postrouting priority 0; policy accept;
        oifname "{egress}*" meta nfproto @egress_received accept
    }}
    chain input {{
        type filter hook input priority 0; policy drop;
        iifname "lo" accept
        iifname @bridges udp dport 53 update @queries4 {{ ip saddr {asked} }} drop
        iifname @bridges udp dport 53 update @queries6 {{ ip6 saddr {asked} }} drop
        iifname @bridges udp dport {{ 53, {closed_dns} }} limit rate over {queries}/second burst {queries} packets drop
        iifname @bridges meta l4proto {{ tcp, udp }} th dport {{ 53, {closed_dns} }} jump policy_dns
        ct state established,related accept
        iifname @bridges icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        iifname @bridges icmpv6 type nd-router-solicit goto guests
        iifname @bridges udp sport . udp dport {{ 68 . 67, 546 . 547 }} goto guests
        {to_gate}
        icmp type echo-request iifname @bridges {first} jump opened
        icmpv6 type echo-request iifname @bridges {first} jump opened
        iifname . ip daddr @gateways4 goto services
        iifname . ip6 daddr @gateways6 goto services
        icmp type echo-request meta mark set iifname map @routers ip daddr . meta mark @routed4 accept
        icmpv6 type echo-request meta mark set iifname map @routers ip6 daddr . meta mark @routed6 accept
        icmp type echo-request iifname . ip daddr @endpoints4 accept comment "service endpoints of linux.transit"
        icmpv6 type echo-request iifname . ip6 daddr @endpoints6 accept
        iifname "{egress}*" meta l4proto {{ tcp, udp }} th dport 53 goto services
        iifname "{egress}*" reject with icmpx admin-prohibited
    }}
    chain services {{
        icmp type echo-request accept
        icmpv6 type echo-request accept
        udp dport 53 accept
        tcp dport {{ 53, {closed_dns} }} ct state new limit rate over {connects}/second burst {connects} packets drop
        tcp dport 53 accept
        iifname @closed ct status dnat meta l4proto {{ tcp, udp }} th dport {closed_dns} accept
        drop
    }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        ct state established ct mark @judged accept
        ct state invalid drop
        ct state related meta l4proto {{ icmp, icmpv6 }} goto errors
        ct state untracked iifname . oifname @paths ip6 hoplimit 255 goto resolution comment "bridged, not routed"
        ct state untracked drop
        ct direction original iifname . oifname @paths goto judge
        ct direction reply oifname . iifname @paths goto judge
        meta mark set iifname map @routers oifname . meta mark @joined goto judge
        ct status dnat goto from_outside comment "linux.outside"
        oifname "{egress}*" ct state established accept
        iifname "{egress}*" goto egress_forward
    }}
    chain resolution {{
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        drop
    }}
    chain errors {{
        iifname . oifname @paths accept comment "whoever sends them: they only quote a connection"
        oifname . iifname @paths accept
        meta mark set iifname map @routers oifname . meta mark @joined meta mark set 0 accept
        iifname "{uplink}" accept
        drop
    }}
    chain from_outside {{
        ct direction original iifname "{uplink}" oifname @bridges goto judge
        ct direction reply oifname "{uplink}" iifname @bridges goto judge
        ct original ip daddr @external4 iifname @bridges oifname @bridges goto judge comment "another network"
        ct original ip6 daddr @external6 iifname @bridges oifname @bridges goto judge
    }}
    chain opened {{
        {opened}
    }}
    chain first {{
        {arriving}
        iifname @bridges jump opened
        oifname "{uplink}" jump leaving
    }}
    chain leaving {{
        {leaving}
    }}
    chain visiting {{
        {visiting}
    }}
    chain judge {{
        {first} jump first
        ct direction original iifname "{peering}*" jump from_peer
        iifname "{peering}*" {first} jump visiting
        ct direction reply oifname "{peering}*" jump to_peer
        jump policies
        ct mark set meta nfproto map @epoch accept
    }}
    chain from_peer {{
        iifname "{peering_vxlan}*" iifname . ip saddr != @visitors4 drop comment "no instance of the peer elsewhere"
        iifname "{peering_vxlan}*" iifname . ip6 saddr != @visitors6 drop
        iifname . meta l4proto @peer_protocols return
        meta l4proto tcp iifname . meta l4proto . ct reply proto-src @peer_ports return
        meta l4proto udp iifname . meta l4proto . ct reply proto-src @peer_ports return
        reject with icmpx admin-prohibited
    }}
    chain to_peer {{
        oifname . meta l4proto @peer_protocols return
        meta l4proto tcp oifname . meta l4proto . ct reply proto-src @peer_ports return
        meta l4proto udp oifname . meta l4proto . ct reply proto-src @peer_ports return
        reject with icmpx admin-prohibited
    }}
    {policy_chains}
    {name_chains}
    chain egress_opened {{
        {egress_opened}
    }}
    chain egress_forward {{
        {first} jump egress_opened
        ip daddr {{ 169.254.0.0/16, {metadata4} }} reject with icmpx admin-prohibited
        oifname "{uplink}" jump operator_out
        oifname "{uplink}" accept
        reject with icmpx admin-prohibited comment "at once: its user waits"
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

METADATA4: Final = ("168.63.129.16", "100.100.100.200", "192.0.0.192")
"""Metadata services of clouds, which give secrets to their machines: Azure, Alibaba, Oracle. Others have link-local
addresses."""


def tenant_rules(table: str) -> str:
    """Return the rules of both tables in a tenant's namespace."""
    asked = f"limit rate over {DNS_QUERIES_EACH}/second burst {DNS_QUERIES_EACH} packets"
    return (
        gateway_rules.text(table)
        + bridge_rules.text(table)
        + _TENANT.format(
            table=table,
            uplink=naming.UPLINK,
            egress=naming.EGRESS,
            peering=naming.PEERING,
            peering_vxlan=naming.PEERING_VXLAN,
            metadata4=", ".join(METADATA4),
            **_limits(),
            asked=asked,
            queries=DNS_QUERIES,
            connects=DNS_CONNECTIONS,
            closed_dns=gateway_rules.CLOSED_DNS_PORT,
            errors=ERRORS,
            policy_sets=policy.sets(),
            policy_chains=policy.chains(),
            name_sets=name_rules.sets(),
            name_chains=name_rules.chains(asked),
            to_gate=name_rules.TO_GATE,
        )
    )


def _limits() -> dict[str, str]:
    """Return the sets and rules of the limits of connections."""

    def limit(name: str, most: int, match: str = "") -> str:
        return connection_limits.rules(name, _LIMITS[name], most, match)

    between = "\n        "
    return {
        "limit_sets": "\n    ".join(connection_limits.sets(name, key) for name, key in _LIMITS.items()),
        "first": connection_limits.FIRST,
        "opened": between.join(limit(name, CONNECTIONS_EACH) for name in ("connections4", "connections6")),
        "arriving": limit("arriving", CONNECTIONS, f'iifname "{naming.UPLINK}"'),
        "leaving": between.join([limit("leaving", CONNECTIONS_EACH), limit("outgoing", CONNECTIONS)]),
        "visiting": limit("visiting", CONNECTIONS),
        "egress_opened": limit("egress_opened", CONNECTIONS),
    }


def install(nft: Nft, table: str, families: Iterable[str], rules: str) -> None:
    """Load rules unless they are installed, in one transaction; the sets keep their elements."""
    wanted = as_listed(rules, table)
    if all(nft.rules(family, table) == wanted[family] for family in families):
        return
    flush = "".join(f"add table {family} {table}\nflush table {family} {table}\n" for family in families)
    try:
        nft.run(flush + rules)
    except OSError:  # a set or chain of another version conflicts
        replace = "".join(f"add table {family} {table}\ndelete table {family} {table}\n" for family in families)
        nft.run(replace + rules)


@cache
def as_listed(rules: str, table: str) -> dict[str, str]:
    """Return `rules` as nft lists them, by family: they are installed in a new namespace and listed there."""

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
    "bridge ndp_macs": "dm",
    "bridge sent": "d",
    "bridge received": "d",
    "bridge reflected": "dd",
    "bridge sought4": "d4",
    "bridge sought6": "dh",
    "inet bridges": "d",
    "inet closed": "d",
    "inet paths": "dd",
    "inet routers": "dn",
    "inet joined": "dn",
    "inet gateways4": "d4",
    "inet gateways6": "d6",
    "inet routed4": "4n",
    "inet routed6": "6n",
    "inet endpoints4": "d4",
    "inet endpoints6": "d6",
    "inet peer_protocols": "dp",
    "inet peer_ports": "dps",
    "inet visitors4": "d4",
    "inet visitors6": "d6",
    "inet egress_sent": "v",
    "inet egress_received": "v",
}
"""The types of an element's parts, as in `keys`."""
SETS: Final = tuple(_TYPES)
"""All sets, by "family set"."""
MAPS: Final = ("inet routers",)
"""Those of the sets that are maps: the last part of an element is what the key is mapped to."""
COUNTED: Final = ("bridge sent", "bridge received")
"""The sets whose elements are counters of ports."""
OF_EGRESS: Final[Elements] = {"inet egress_sent": [("ipv4",)], "inet egress_received": [("ipv4",)]}
"""The elements that count the packets of all namespaces of `linux.egress`, which have no IPv6. They are never deleted.
"""
COUNTERS: Final = (*COUNTED, *OF_EGRESS)
"""The sets whose elements have counters. An element's comment is random: it tells that its counter began anew."""


def of_network(network: Network) -> dict[str, list[tuple[str, ...]]]:
    """Return the elements for a network."""
    device = naming.bridge(network.index)
    return {
        "inet bridges": [(device,)],
        "inet closed": [(device,)] if network.outbound == "none" else [],
        "inet paths": [(device, device), *([(device, naming.UPLINK)] if network.outbound == "nat" else [])],
        "inet gateways4": [(device, network.gateway)],
        "inet gateways6": [(device, network.gateway6)] if network.gateway6 else [],
    }


def of_port(port: Port) -> dict[str, list[tuple[str, ...]]]:
    """Return the elements for a port: the source addresses that it may send from, and its counters."""
    device, mac = naming.port(port.index), port.mac
    more = pairs.single(port)
    six = [(mac, port.address6), (mac, link_local(mac))] if port.address6 else []
    six += [pair for pair in more if ":" in pair[1] and pair not in six]
    four = [(mac, port.address), *(pair for pair in more if ":" not in pair[1])]
    macs: list[tuple[str, ...]] = [(device, each) for each in (mac, *pairs.macs(port))]
    return {
        "bridge macs": macs,
        "bridge ipv4": [(device, *pair) for pair in four],
        "bridge ipv6": [(device, *pair) for pair in six],
        "bridge ndp": [(device, each, _target(address)) for each, address in six],
        "bridge ndp_macs": macs if six else [],
        "bridge sought4": [(device, address) for address in dict.fromkeys(address for _, address in four)],
        "bridge sought6": [(device, _target(address)) for address in dict.fromkeys(address for _, address in six)],
        "bridge reflected": [(device, device)],
        **{name: [(device,)] for name in COUNTED},
    }


def of_remote(network: Network, remote: RemotePort) -> dict[str, list[tuple[str, ...]]]:
    """Return the elements for a port on another host: the source addresses of its frames from the VXLAN device."""
    device, mac = naming.vxlan(network.index), remote.mac
    six = [address for address in remote.addresses if ":" in address]
    six += [link_local(mac)] if six else []
    four = [address for address in remote.addresses if ":" not in address]
    return {
        "bridge macs": [(device, mac)],
        "bridge ipv4": [(device, mac, address) for address in four],
        "bridge ipv6": [(device, mac, address) for address in six],
        "bridge ndp": [(device, mac, _target(address)) for address in six],
        "bridge ndp_macs": [(device, mac)] if six else [],
        "bridge sought4": [(device, address) for address in four],
        "bridge sought6": [(device, _target(address)) for address in six],
    }


def _target(address: str) -> str:
    """Return the target of a message of neighbor discovery, 16 bytes, as an element has it."""
    return f"0x{int(IPv6Address(address)):032x}"


def of_routed(network: Network, addresses: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """Return the elements for packets that other hosts have routed to a network: their frames have the MAC address of
    the gateway, and the source addresses of instances in other networks."""
    device, mac = naming.vxlan(network.index), gateway_mac(network.index)
    return {
        "bridge macs": [(device, mac)] if addresses else [],
        "bridge ipv4": [(device, mac, address) for address in addresses if ":" not in address],
        "bridge ipv6": [(device, mac, address) for address in addresses if ":" in address],
    }


def add(table: str, elements: Elements) -> list[Request]:
    """Return requests that add elements; no error if they exist."""
    return change(table, _keys(elements), {})


def delete(table: str, elements: Elements) -> list[Request]:
    """Return requests that delete elements; no error if they don't exist."""
    return change(table, {}, _keys(elements))


def change(table: str, added: Keys, deleted: Keys) -> list[Request]:
    """Return requests that add and delete keys. What is deleted is added first: a missing key would be an error. It
    goes before others are added: a map has one element of a key."""
    requests = [each for name, some in deleted.items() for each in _addition(name, table, some)]
    for name, some in deleted.items():
        requests += delete_elements(*_of(name, table), (_mapped(key)[0].first if name in MAPS else key for key in some))
    return requests + [each for name, some in added.items() for each in _addition(name, table, some)]


def _addition(name: str, table: str, some: Iterable[bytes]) -> Iterator[Request]:
    if name in MAPS:
        return maps.add(*_of(name, table), dict(map(_mapped, some)))
    return add_elements(*_of(name, table), some, os.urandom(8).hex() if name in COUNTERS else "")


def _mapped(packed: bytes) -> tuple[KeyInterval, bytes]:
    return KeyInterval(packed[: -keys.NUMBER]), packed[-keys.NUMBER :]


def read(nftables: NftablesSocket, table: str, name: str) -> set[bytes]:
    """Return the keys of the set `name`; none if it is missing. NetlinkError."""
    if name in MAPS:
        return {key.first + data for key, data in maps.read(nftables, *_of(name, table)).items()}
    return set(nftables.keys(*_of(name, table)))


def _of(name: str, table: str) -> tuple[str, str, str]:
    family, _, set_ = name.partition(" ")
    return family, table, set_


def _keys(elements: Elements) -> Keys:
    return {name: [key(name, element) for element in some] for name, some in elements.items()}


def key(name: str, element: tuple[str, ...]) -> bytes:
    """Convert an element of the set `name` to the kernel's key (`kernel.netlink.nftables`)."""
    return keys.packed(_TYPES[name], element)


def element(name: str, packed: bytes) -> tuple[str, ...]:
    """Convert a key of the set `name` to an element."""
    return keys.unpacked(_TYPES[name], packed)
