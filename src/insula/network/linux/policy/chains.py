"""The static rules of policies in a tenant's table `inet`: chains, and the sets and maps that they look up.

`chain policies` judges a connection by its tuples (conntrack), so that packets of both directions are judged alike. It
returns if the connection is allowed; else a chain that it goes to ends the packet. Stages: the operator's rules,
policies of the source in direction out, policies of the destination in direction in, and then policies in audit.

In each stage the class of the *subject* is in the packet's mark, and that of the other end in its priority. A look-up
in `pairs` or `to_all` replaces the latter by the number of a set of ports, which `chain granted` looks up.
"""

from __future__ import annotations

from insula.network.linux import naming
from insula.network.linux.policy.numbers import GRANTED

AUDITED = 4096
"""Flows that one tenant's policies in audit count, of each IP version and direction."""

_SETS = """
    map subjects4 { type ipv4_addr : mark; }
    map subjects6 { type ipv6_addr : mark; }
    map peers4 { type ipv4_addr : classid; }
    map peers6 { type ipv6_addr : classid; }
    map ranges4 { type ipv4_addr : classid; flags interval; }
    map ranges6 { type ipv6_addr : classid; flags interval; }
    map subject_ranges4 { type ipv4_addr : mark; flags interval; }
    map subject_ranges6 { type ipv6_addr : mark; flags interval; }
    set unknown { type classid; }
    set without_dns { type mark; }
    set everything { type classid; }
    set protocols { type classid . inet_proto; }
    set ports { type classid . inet_proto . inet_service; }
    set port_ranges { type classid . inet_proto . inet_service; flags interval; }
    map operator4 { type ipv4_addr : classid; flags interval; }
    map operator6 { type ipv6_addr : classid; flags interval; }
    map operator_tcp { type inet_service : mark; flags interval; }
    map operator_udp { type inet_service : mark; flags interval; }
    map operator_icmp { type inet_service : mark; flags interval; }
    map operator_icmpv6 { type inet_service : mark; flags interval; }
"""
_SETS_OF_DIRECTION = """
    set {kind}isolated_{direction} {{ type mark; }}
    map {kind}pairs_{direction} {{ type mark . classid : classid; }}
    map {kind}to_all_{direction} {{ type mark : classid; }}
"""
_SETS_OF_OPERATOR = """
    set operator_accept_{direction} {{ type classid . mark; }}
    set operator_deny_{direction} {{ type classid . mark; }}
"""
_SETS_OF_AUDIT = f"""
    set audited4_{{direction}} {{{{
        type ipv4_addr . ipv4_addr . inet_proto . inet_service; size {AUDITED}; counter; flags dynamic;
    }}}}
    set audited6_{{direction}} {{{{
        type ipv6_addr . ipv6_addr . inet_proto . inet_service; size {AUDITED}; counter; flags dynamic;
    }}}}
"""

_CHAINS = f"""
    chain granted {{
        meta priority @everything goto grant
        meta priority . meta l4proto @protocols goto grant
        meta l4proto tcp meta priority . meta l4proto . ct reply proto-src @ports goto grant
        meta l4proto udp meta priority . meta l4proto . ct reply proto-src @ports goto grant
        meta l4proto icmp meta priority . meta l4proto . ct original proto-dst @ports goto grant
        meta l4proto icmpv6 meta priority . meta l4proto . ct original proto-dst @ports goto grant
        meta l4proto tcp meta priority . meta l4proto . ct reply proto-src @port_ranges goto grant
        meta l4proto udp meta priority . meta l4proto . ct reply proto-src @port_ranges goto grant
    }}
    chain grant {{
        meta priority set {GRANTED:#x}
    }}
    chain source_subject {{
        meta mark set 0
        meta mark set ct original ip saddr map @subject_ranges4
        meta mark set ct original ip6 saddr map @subject_ranges6
        meta mark set ct original ip saddr map @subjects4
        meta mark set ct original ip6 saddr map @subjects6
    }}
    chain destination_subject {{
        meta mark set 0
        meta mark set ct reply ip saddr map @subject_ranges4
        meta mark set ct reply ip6 saddr map @subject_ranges6
        meta mark set ct reply ip saddr map @subjects4
        meta mark set ct reply ip6 saddr map @subjects6
    }}
    chain source_peer {{
        meta priority set 0
        meta priority set ct original ip saddr map @ranges4
        meta priority set ct original ip6 saddr map @ranges6
        meta priority set ct original ip saddr map @peers4
        meta priority set ct original ip6 saddr map @peers6
    }}
    chain destination_peer {{
        meta priority set 0
        meta priority set ct reply ip saddr map @ranges4
        meta priority set ct reply ip6 saddr map @ranges6
        meta priority set ct reply ip saddr map @peers4
        meta priority set ct reply ip6 saddr map @peers6
    }}
    chain operator_ports {{
        meta mark set 0
        meta l4proto tcp meta mark set ct reply proto-src map @operator_tcp
        meta l4proto udp meta mark set ct reply proto-src map @operator_udp
        meta l4proto icmp meta mark set ct original proto-dst map @operator_icmp
        meta l4proto icmpv6 meta mark set ct original proto-dst map @operator_icmpv6
    }}
    chain operator_out {{
        jump operator_ports
        meta priority set 0
        meta priority set ct reply ip saddr map @operator4
        meta priority set ct reply ip6 saddr map @operator6
        meta priority . meta mark @operator_accept_out return
        meta priority . meta mark @operator_deny_out drop
        goto policy_out
    }}
    chain operator_in {{
        jump operator_ports
        meta priority set 0
        meta priority set ct original ip saddr map @operator4
        meta priority set ct original ip6 saddr map @operator6
        meta priority . meta mark @operator_accept_in return
        meta priority . meta mark @operator_deny_in drop
        goto policy_out
    }}
    chain policies {{
        jump stages
        meta mark set 0
        meta priority set 0
    }}
    chain stages {{
        jump source_peer
        meta priority @unknown drop comment "an address of a network that no port has"
        ct direction original oifname "{naming.UPLINK}" goto operator_out
        ct direction reply iifname "{naming.UPLINK}" goto operator_out
        ct direction original iifname "{naming.UPLINK}" goto operator_in
        ct direction reply oifname "{naming.UPLINK}" goto operator_in
        goto policy_out
    }}
    chain policy_out {{
        jump source_subject
        meta mark != @isolated_out goto policy_in
        jump destination_peer
        meta priority set meta mark . meta priority map @pairs_out
        jump granted
        meta priority {GRANTED:#x} goto policy_in
        meta priority set meta mark map @to_all_out
        jump granted
        meta priority {GRANTED:#x} goto policy_in
        jump by_name
        meta priority {GRANTED:#x} goto policy_in
        goto refused
    }}
    chain policy_in {{
        jump destination_subject
        meta mark != @isolated_in goto audit_out
        jump source_peer
        meta priority set meta mark . meta priority map @pairs_in
        jump granted
        meta priority {GRANTED:#x} goto audit_out
        meta priority set meta mark map @to_all_in
        jump granted
        meta priority {GRANTED:#x} goto audit_out
        goto refused
    }}
    chain audit_out {{
        jump source_subject
        meta mark != @audit_isolated_out goto audit_in
        jump destination_peer
        meta priority set meta mark . meta priority map @audit_pairs_out
        jump granted
        meta priority {GRANTED:#x} goto audit_in
        meta priority set meta mark map @audit_to_all_out
        jump granted
        meta priority {GRANTED:#x} goto audit_in
        COUNT_OUT
        goto audit_in
    }}
    chain audit_in {{
        jump destination_subject
        meta mark != @audit_isolated_in return
        jump source_peer
        meta priority set meta mark . meta priority map @audit_pairs_in
        jump granted
        meta priority {GRANTED:#x} return
        meta priority set meta mark map @audit_to_all_in
        jump granted
        meta priority {GRANTED:#x} return
        COUNT_IN
    }}
    chain refused {{
        meta mark set 0
        meta priority set 0
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }}
    chain policy_dns {{
        meta mark set 0
        meta mark set ip saddr map @subject_ranges4
        meta mark set ip6 saddr map @subject_ranges6
        meta mark set ip saddr map @subjects4
        meta mark set ip6 saddr map @subjects6
        ip6 saddr fe80::/10 drop comment "whose it is can't be looked up"
        meta mark @without_dns goto refused
        meta mark set 0
        jump source_peer
        meta priority @unknown drop comment "it may send nothing"
        meta priority set 0
    }}
"""


def _count(direction: str) -> str:
    """Return the rules that count a flow: TCP and UDP by port, ICMP by type and code, others without."""
    found = []
    for version, ip in ((4, "ip"), (6, "ip6")):
        for protocol, port in (("{ tcp, udp }", "ct reply proto-src"), ("{ icmp, icmpv6 }", "ct original proto-dst")):
            key = f"ct original {ip} saddr . ct reply {ip} saddr . meta l4proto . {port}"
            found.append(f"meta l4proto {protocol} update @audited{version}_{direction} {{ {key} counter }}")
    return "\n        ".join(found)


def sets() -> str:
    """Return the declarations of all sets and maps."""
    found = [_SETS]
    for direction in ("out", "in"):
        found += [_SETS_OF_DIRECTION.format(kind=kind, direction=direction) for kind in ("", "audit_")]
        found += [each.format(direction=direction) for each in (_SETS_OF_OPERATOR, _SETS_OF_AUDIT)]
    return "".join(found)


def chains() -> str:
    """Return the chains, of which `policies` judges connections and `policy_dns` queries at the gateways."""
    return _CHAINS.replace("COUNT_OUT", _count("out")).replace("COUNT_IN", _count("in"))
