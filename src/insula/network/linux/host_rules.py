"""The rules in the host's namespace: they isolate tenants from each other and from the host.

Every packet of a tenant that leaves its namespace comes in by its uplink, with an address of the uplink. Which instance
it is of was judged before, in the tenant's namespace (`rules`). Other tenants reach what a tenant offers to the outside
(`linux.outside`). So that none of them fills what a tenant may have of open connections, each client's are limited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from insula.network.linux import connection_limits
from insula.network.linux.naming import Naming
from insula.network.linux.rules import ERRORS, METADATA4
from insula.network.linux.underlay import Underlay, chains
from insula.network.packets import DSCP

METADATA6: Final = ("fd00:ec2::/32", "fd20:ce::254")
"""Metadata services of AWS and Google."""
CONNECTIONS_CLIENT: Final = 2048  # to a tenant, of one address outside (IPv6: its /64), or of one other tenant
FIRST_DNS_PORT: Final = 5300  # at the host's end of an uplink; packets to it are translated to the first name server
_LIMITS: Final = {
    "clients4": ("ip saddr . oifname", "ip saddr . oifname"),
    "clients6": ("ip6 saddr . oifname", "ip6 saddr & ffff:ffff:ffff:ffff:: . oifname"),
    "tenants": ("iifname . oifname", "iifname . oifname"),
}
"""The key of each limit of clients, as the set has it and as rules make it."""

_HOST = """
table inet {table} {{
    set members4 {{ typeof ip saddr; }}
    set members6 {{ typeof ip6 saddr; }}
    set floating4 {{ typeof ip daddr . oifname; }}
    set floating6 {{ typeof ip6 daddr . oifname; }}
    {limit_sets}

    chain input {{
        type filter hook input priority -5; policy accept;
        iifname "{uplinks}*" goto to_host
    }}
    {underlay}
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
        {redirects}
    }}
    chain from_tenant {{
        meta priority set 0 comment "it was a class of guarantees, which the host's devices may have too"
        fib saddr . iif oif missing drop
        oifname "{uplinks}*" goto to_tenant comment "another tenant, or the same: what is open to the outside"
        ip daddr @members4 udp dport {vxlan} drop
        ip6 daddr @members6 udp dport {vxlan} drop
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
        ct status dnat goto client comment "published ports: linux.outside"
        ip daddr . oifname @floating4 goto client
        ip6 daddr . oifname @floating6 goto client
        drop
    }}
    chain client {{
        {first} jump first
        accept
    }}
    chain first {{
        iifname "{uplinks}*" goto first_of_tenant
        {clients4}
        {clients6}
    }}
    chain first_of_tenant {{
        {tenants}
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
        ip saddr . iifname @floating4 accept
        ip6 saddr . iifname @floating6 accept
        iifname "{uplinks}*" masquerade
    }}
}}
"""


def host_rules(
    names: Naming,
    servers: Sequence[str] = (),
    closed: Mapping[int, Sequence[str]] = MappingProxyType({}),
    underlay: Underlay | None = None,
) -> str:
    """Return the rules of the table in the host's namespace.

    Tenants may not reach uplinks' addresses, nor the metadata services of the cloud that the host runs in, which have
    link-local and some other addresses. `servers` are the upstream name servers: resolvers send queries to the host's
    end of their uplink, which are translated to these, because a tenant's network may have the servers' addresses.
    Between the devices in `closed`, by IP version, nothing is forwarded: the host did not forward before insulad
    enabled it. Packets to the VXLAN port of this host's `underlay` address are accepted from the other hosts only, and
    not tracked: there are as many of their connections as of all instances together.
    """
    return _HOST.format(
        table=names.prefix,
        uplinks=names.uplinks,
        vxlan=underlay.port if underlay else 4789,
        first=connection_limits.FIRST,
        limit_sets="\n    ".join(connection_limits.sets(name, of) for name, (of, _) in _LIMITS.items()),
        **{name: connection_limits.rules(name, key, CONNECTIONS_CLIENT) for name, (_, key) in _LIMITS.items()},
        underlay="" if underlay is None else chains(underlay),
        range4=names.range4,
        range6=names.range6,
        metadata4=", ".join(METADATA4),
        metadata6=", ".join(METADATA6),
        dscp=DSCP,
        errors=ERRORS,
        redirects="\n        ".join(_redirect(names, number, server) for number, server in enumerate(servers)),
        closed="\n        ".join(_closed(version, devices) for version, devices in closed.items() if devices),
    )


def _redirect(names: Naming, number: int, server: str) -> str:
    ip, range_, to = ("ip6", names.range6, f"[{server}]") if ":" in server else ("ip", names.range4, server)
    query = f'iifname "{names.uplinks}*" {ip} daddr {range_} meta l4proto {{ tcp, udp }}'
    return f"{query} th dport {FIRST_DNS_PORT + number} dnat {ip} to {to}:53"


def _closed(version: int, devices: Sequence[str]) -> str:
    names = ", ".join(f'"{device}"' for device in devices)
    return f"meta nfproto ipv{version} iifname {{ {names} }} oifname {{ {names} }} drop"
