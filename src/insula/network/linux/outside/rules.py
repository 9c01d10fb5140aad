"""The rules of the tables for packets from outside. All of them look up maps, so they are the same for any number of
ports, addresses and balancers.

NAT rules see the first packet of a connection only; connection tracking translates the others. The chains come before
those of the tables in `linux.rules`, which translate what these leave alone.

Keys are (address, protocol, port), or (protocol, port) for ports of every address of the host. A map with single ports
is a hash table; another has ranges of ports, whose elements keep the port. A balancer's map leads to its number, and
`places` has the backend for a number and a hash of the client's address and port. A balancer without backends refuses
connections, as a closed port does.
"""

from __future__ import annotations

from typing import Final

from insula.network.linux import naming
from insula.network.linux.naming import Naming
from insula.network.maglev import PLACES

_SEED: Final = "0x1"
_HASHED: Final = {"spread": "{ip} saddr . th sport", "affine": "{ip} saddr"}
"""What is hashed to find a backend: each connection by itself, or all of a client together."""

_TENANT = """
table inet {table} {{
{maps}
    chain prerouting {{
        type nat hook prerouting priority -110; policy accept;
        iifname "{uplink}" goto translate
        ip daddr @dialed4 goto translate comment "from the tenant's own instances"
        ip6 daddr @dialed6 goto translate
    }}
    chain translate {{
        meta nfproto ipv4 goto translate4
        meta nfproto ipv6 goto translate6
    }}
{chains}
    chain refused {{
        meta l4proto tcp reject with tcp reset
        reject with icmpx port-unreachable
    }}
    chain postrouting {{
        type nat hook postrouting priority 90; policy accept;
        ct status dnat snat ip to ip saddr . ip daddr map @selves4
        ct status dnat snat ip6 to ip6 saddr . ip6 daddr map @selves6
        oifname "{uplink}" snat ip to ip saddr map @sources4
        oifname "{uplink}" snat ip6 to ip6 saddr map @sources6
    }}
}}
"""

_TENANT_MAPS = """\
    map ports{v} {{ type {address} . inet_proto . inet_service : {address} . inet_service; }}
    map ranges{v} {{ type {address} . inet_proto . inet_service : {address}; flags interval; }}
    map spread{v} {{ type {address} . inet_proto . inet_service : classid; }}
    map affine{v} {{ type {address} . inet_proto . inet_service : classid; }}
    map host_ports{v} {{ type inet_proto . inet_service : {address} . inet_service; }}
    map host_ranges{v} {{ type inet_proto . inet_service : {address}; flags interval; }}
    map host_spread{v} {{ type inet_proto . inet_service : classid; }}
    map host_affine{v} {{ type inet_proto . inet_service : classid; }}
    map places{v} {{ type classid . mark : {address} . inet_service; }}
    map floating{v} {{ type {address} : {address}; }}
    map sources{v} {{ type {address} : {address}; }}
    map selves{v} {{ type {address} . {address} : {address}; }}
    set hosts{v} {{ type {address}; }}
    set dialed{v} {{ type {address}; }}
"""

_TENANT_CHAINS = """\
    chain translate{v} {{
        dnat {ip} to {ip} daddr . meta l4proto . th dport map @ports{v}
        meta l4proto {{ tcp, udp }} dnat {ip} to {ip} daddr . meta l4proto . th dport map @ranges{v}
        {spread}
        {affine}
        dnat {ip} to {ip} daddr map @floating{v}
        {ip} daddr @hosts{v} goto host{v}
    }}
    chain host{v} {{
        dnat {ip} to meta l4proto . th dport map @host_ports{v}
        meta l4proto {{ tcp, udp }} dnat {ip} to meta l4proto . th dport map @host_ranges{v}
        {host_spread}
        {host_affine}
    }}
"""

_BACKEND_CHAIN = """\
    chain {kind}{v} {{
        meta mark set jhash {hashed} mod {places} seed {seed}
        meta l4proto {{ tcp, udp }} dnat {ip} to meta priority . meta mark map @places{v}
        goto refused comment "no backend is healthy"
    }}
"""

_HOST = """
table inet {table} {{
{maps}
    chain loopback {{
        type filter hook prerouting priority -310; policy accept;
        iifname "{uplinks}*" ip saddr 127.0.0.0/8 drop comment "route_localnet would let it in"
        iifname "{uplinks}*" ip daddr 127.0.0.0/8 drop
        iifname "{uplinks}*" ip6 saddr ::1 drop
        iifname "{uplinks}*" ip6 daddr ::1 drop
    }}
    chain prerouting {{
        type nat hook prerouting priority -110; policy accept;
        meta nfproto ipv4 goto translate4
        meta nfproto ipv6 goto translate6
    }}
    chain output {{
        type nat hook output priority -110; policy accept;
        meta nfproto ipv4 goto translate4
        meta nfproto ipv6 goto translate6
    }}
{chains}
    chain postrouting {{
        type nat hook postrouting priority 90; policy accept;
        oifname != "{uplinks}*" return
        ip saddr 127.0.0.0/8 masquerade
        ip6 saddr ::1 masquerade
        oifname . ip saddr @overlaps4 masquerade comment "the tenant has networks with these addresses"
        oifname . ip6 saddr @overlaps6 masquerade
    }}
}}
"""

_HOST_MAPS = """\
    map ports{v} {{ type {address} . inet_proto . inet_service : {address}; }}
    map ranges{v} {{ type {address} . inet_proto . inet_service : {address}; flags interval; }}
    map host_ports{v} {{ type inet_proto . inet_service : {address}; }}
    map host_ranges{v} {{ type inet_proto . inet_service : {address}; flags interval; }}
    set overlaps{v} {{ type ifname . {address}; flags interval; }}
"""

_HOST_CHAINS = """\
    chain translate{v} {{
        {ip} daddr {uplink_range} return comment "the host's ends of uplinks"
        fib daddr type != local return comment "an address that the host has lost may be that of another host"
        dnat {ip} to {ip} daddr . meta l4proto . th dport map @ports{v}
        meta l4proto {{ tcp, udp }} dnat {ip} to {ip} daddr . meta l4proto . th dport map @ranges{v}
        dnat {ip} to meta l4proto . th dport map @host_ports{v}
        meta l4proto {{ tcp, udp }} dnat {ip} to meta l4proto . th dport map @host_ranges{v}
    }}
"""

_FAMILIES: Final = {4: ("ip", "ipv4_addr"), 6: ("ip6", "ipv6_addr")}


def table(prefix: str) -> str:
    """Return the name of the tables."""
    return f"{prefix}-outside"


def tenant_rules(prefix: str) -> str:
    """Return the rules of the table in a tenant's namespace."""
    chains = [
        *(_backend_chain(version, kind) for version in _FAMILIES for kind in _HASHED),
        *(
            _TENANT_CHAINS.format(
                v=version,
                ip=ip,
                **{kind: _balance(version, kind, f"{ip} daddr . ") for kind in _HASHED},
                **{f"host_{kind}": _balance(version, kind, "", "host_") for kind in _HASHED},
            )
            for version, (ip, _) in _FAMILIES.items()
        ),
    ]
    maps = [_TENANT_MAPS.format(v=version, address=address) for version, (_, address) in _FAMILIES.items()]
    return _TENANT.format(table=table(prefix), uplink=naming.UPLINK, maps="".join(maps), chains="".join(chains))


def _balance(version: int, kind: str, head: str, prefix: str = "") -> str:
    """Return the rule that takes connections to a balancer; its number goes to the chain of its backends."""
    number = f"meta priority set {head}meta l4proto . th dport map @{prefix}{kind}{version}"
    return f"{number} goto {kind}{version}"


def _backend_chain(version: int, kind: str) -> str:
    """Return the chain that leads a connection to one of a balancer's backends."""
    ip = _FAMILIES[version][0]
    hashed = _HASHED[kind].format(ip=ip)
    return _BACKEND_CHAIN.format(kind=kind, v=version, ip=ip, hashed=hashed, places=PLACES, seed=_SEED)


def host_rules(names: Naming) -> str:
    """Return the rules of the table in the host's namespace."""
    ranges = {4: names.range4, 6: names.range6}
    chains = [
        _HOST_CHAINS.format(v=version, ip=ip, uplink_range=ranges[version]) for version, (ip, _) in _FAMILIES.items()
    ]
    maps = [_HOST_MAPS.format(v=version, address=address) for version, (_, address) in _FAMILIES.items()]
    return _HOST.format(table=table(names.prefix), uplinks=names.uplinks, maps="".join(maps), chains="".join(chains))
