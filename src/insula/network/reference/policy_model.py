"""The meaning of policies, as plain as possible: whether a connection is allowed by a tenant's policies.

This is the reference that the compiler (`linux/policy`) and the installed state are compared with. It shares no code
with the compiler, and has no index or cache: it asks every policy about every connection. Only policies are judged
here, not whether a path leads from one end to the other.

A connection has a source and a destination, which are addresses, a protocol ("tcp", "udp", "icmp", "icmpv6", or
another one's name), and a port or ICMP type. What answers it, and ICMP errors about it, belong to it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from insula.model.objects import Port
from insula.model.policies import (
    AnyPeer,
    CidrPeer,
    Direction,
    GroupPeer,
    InstancePeer,
    Policy,
    PolicyPeer,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.network.addresses import link_local
from insula.network.intent import RemotePort, TenantIntent


class Verdict(NamedTuple):
    """Whether a connection is allowed, and why. `tier` tells what decided: "operator", "out" or "in" for the policies
    of that direction, "address" for an address that nobody has, or "" if nothing forbids it. `policies` are those that
    allow it there, or if none does those that select the instance."""

    allowed: bool
    tier: str
    policies: tuple[str, ...] = ()


def permits(intent: TenantIntent, source: str, destination: str, protocol: str, port: int | None = None) -> bool:
    """Whether the operator's and the tenant's policies allow a connection."""
    return judge(intent, source, destination, protocol, port).allowed


def judge(intent: TenantIntent, source: str, destination: str, protocol: str, port: int | None = None) -> Verdict:
    """Return the verdict about a connection, in the order of the stages: operator, source, destination."""
    if not sends(intent, source):
        return Verdict(False, "address")
    if (decided := _operator(intent, source, destination, protocol, port)) is not None:
        return decided
    deciding: list[str] = []
    stages: tuple[tuple[Direction, str, str], ...] = (("out", source, destination), ("in", destination, source))
    for direction, subject, other in stages:
        selecting = [p for p in intent.policy.policies if not p.audit and selects(intent, p, direction, subject)]
        if not selecting:
            continue
        allowing = [p.name for p in selecting if allows(intent, p, direction, other, protocol, port)]
        if is_shared(intent, subject):
            allowing = []
        if not allowing:
            return Verdict(False, direction, tuple(p.name for p in selecting))
        deciding += allowing
    return Verdict(True, "", tuple(dict.fromkeys(deciding)))


def would_deny(
    intent: TenantIntent, policy: Policy, direction: Direction, source: str, destination: str, protocol: str, port: int
) -> bool:
    """Whether a policy in audit, enforced beside the others, would deny a connection that is allowed now."""
    subject, other = (source, destination) if direction == "out" else (destination, source)
    if not selects(intent, policy, direction, subject):
        return False
    others = [p for p in intent.policy.policies if not p.audit and selects(intent, p, direction, subject)]
    return not any(allows(intent, each, direction, other, protocol, port) for each in (policy, *others))


def sends(intent: TenantIntent, address: str) -> bool:
    """Whether anything may come from an address: from outside, or from one of the tenant's that instances have. A
    shared one does not tell whose policies hold for it."""
    return not is_inside(intent, address) or port_of(intent, address) is not None


def resolves(intent: TenantIntent, address: str) -> bool:
    """Whether an instance may ask the resolver at its gateway."""
    return sends(intent, address) and all(
        p.dns or p.audit or not selects(intent, p, "out", address) for p in intent.policy.policies
    )


# -- policies ----------------------------------------------------------------------------------------------------------


def selects(intent: TenantIntent, policy: Policy, direction: Direction, address: str) -> bool:
    """Whether a policy selects the instance that has this address, or one of those that share it, in this direction."""
    return direction in policy.directions and any(
        matches(policy.select, _labels(intent, port)) for port in _holders(intent, address)
    )


def allows(
    intent: TenantIntent, policy: Policy, direction: Direction, other: str, protocol: str, port: int | None
) -> bool:
    """Whether a rule of the policy allows connections with the address `other`."""
    return any(rule_allows(intent, rule, direction, other, protocol, port) for rule in policy.rules)


def rule_allows(
    intent: TenantIntent, rule: PolicyRule, direction: Direction, other: str, protocol: str, port: int | None
) -> bool:
    """Whether this rule allows it. Addresses of DNS names come and go: such a peer never matches here."""
    return (
        rule.direction == direction
        and any(_is_peer(intent, peer, other) for peer in rule.peers)
        and _has_port(rule.ports, protocol, port)
    )


def _is_peer(intent: TenantIntent, peer: PolicyPeer, address: str) -> bool:
    if isinstance(peer, AnyPeer):
        return True
    if isinstance(peer, InstancePeer):
        port = port_of(intent, address)
        if port is None or (peer.network is not None and port.network != peer.network):
            return False
        return matches(peer.select, _labels(intent, port))
    if isinstance(peer, CidrPeer):
        return _within(address, [peer.cidr]) and not _within(address, peer.exceptions)
    if isinstance(peer, GroupPeer):
        return any(group.name == peer.group and _within(address, group.cidrs) for group in intent.policy.groups)
    return False


def _has_port(ports: Iterable[PortMatch], protocol: str, port: int | None) -> bool:
    """Whether one of `ports` matches; none at all match everything."""
    listed = list(ports)
    return not listed or any(is_port(each, protocol, port) for each in listed)


def is_port(match: PortMatch, protocol: str, port: int | None) -> bool:
    """Whether a protocol with a port, or an ICMP type, is one of those that match."""
    if match.protocol == "icmp" and match.icmp_type is None:
        return protocol in ("icmp", "icmpv6")
    if match.protocol != protocol:
        return False
    if match.protocol in ("icmp", "icmpv6"):
        return match.icmp_type is None or match.icmp_type == port
    if match.port is None:
        return True
    return port is not None and match.port <= port <= (match.end_port or match.port)


def matches(selector: Selector, labels: Mapping[str, str]) -> bool:
    """Whether labels fulfil all conditions of a selector."""
    for key, value in selector.labels.items():
        if labels.get(key) != value:
            return False
    for each in selector.expressions:
        present = each.key in labels
        fulfilled = {
            "In": present and labels.get(each.key) in each.values,
            "NotIn": not present or labels.get(each.key) not in each.values,
            "Exists": present,
            "DoesNotExist": not present,
        }
        if not fulfilled[each.operator]:
            return False
    return True


# -- the operator ------------------------------------------------------------------------------------------------------


def _operator(intent: TenantIntent, source: str, destination: str, protocol: str, port: int | None) -> Verdict | None:
    """Return the verdict of the first rule of the operator that matches; None if it is left to the tenant. These rules
    judge what goes from the tenant to the outside, and what comes from there."""
    if is_inside(intent, source) and not is_inside(intent, destination):
        direction, other = "out", destination
    elif is_inside(intent, destination) and not is_inside(intent, source):
        direction, other = "in", source
    else:
        return None
    for policy in intent.policy.operator:
        for rule in policy.rules:
            if rule.direction != direction or not _has_port(rule.ports, protocol, port):
                continue
            if any(_is_peer(intent, peer, other) for peer in rule.peers):
                if rule.action == "pass":
                    return None
                return Verdict(rule.action == "accept", "operator", (policy.name,))
    return None


# -- addresses ---------------------------------------------------------------------------------------------------------


def port_of(intent: TenantIntent, address: str) -> Port | RemotePort | None:
    """Return the port of the instance that has this address, or is allowed to use it, here or on another host; None if
    nobody is, or if ports that rules may tell apart are."""
    found = _holders(intent, address)
    return found[0] if found and _are_alike(intent, found) else None


def is_shared(intent: TenantIntent, address: str) -> bool:
    """Whether several instances that rules may tell apart may use an address, and none has it as its own. Nothing comes
    from there; nothing goes there if a policy selects one of them, as its rules need not be those of another."""
    found = _holders(intent, address)
    return bool(found) and not _are_alike(intent, found)


def _holders(intent: TenantIntent, address: str) -> list[Port | RemotePort]:
    """Return the ports that have an address, or else those that are allowed to use it. A link-local address that
    several have belongs to none: no policy is about it."""
    wanted = _address(address)
    every: list[Port | RemotePort] = [*intent.ports, *_elsewhere(intent)]
    own = [port for port in every if wanted in _parsed(*_own_addresses(port))]
    if own:
        return own if _are_alike(intent, own) else []
    return [port for port in intent.ports if _within(address, [pair.address for pair in port.allowed_pairs])]


def _are_alike(intent: TenantIntent, ports: Sequence[Port | RemotePort]) -> bool:
    """Whether no rule tells these ports apart."""
    first = ports[0]
    return all((p.network, _labels(intent, p)) == (first.network, _labels(intent, first)) for p in ports)


def _elsewhere(intent: TenantIntent) -> list[RemotePort]:
    """Return the ports on other hosts. One that is here too has moved here."""
    here = {(port.network, port.instance) for port in intent.ports} if intent.remotes else set()
    return [remote for remote in intent.remotes if (remote.network, remote.instance) not in here]


def _own_addresses(port: Port | RemotePort) -> list[str]:
    if isinstance(port, RemotePort):
        return [*port.addresses, *([link_local(port.mac)] if any(":" in each for each in port.addresses) else [])]
    return [port.address, *([port.address6, link_local(port.mac)] if port.address6 else [])]


def is_inside(intent: TenantIntent, address: str) -> bool:
    """Whether an address belongs to one of the tenant's networks, each of which has all link-local ones, or may be used
    by an instance."""
    subnets = [subnet for network in intent.networks for subnet in (network.subnet, network.subnet6) if subnet]
    allowed = [pair.address for port in intent.ports for pair in port.allowed_pairs]
    return _within(address, ["fe80::/10", *subnets, *allowed])


def _within(address: str, cidrs: Iterable[str]) -> bool:
    one = _address(address)
    return any(one in network for network in map(_network, cidrs) if network.version == one.version)


# texts are parsed once: this takes longer than all else here

_address = functools.lru_cache(maxsize=8192)(ip_address)
_parsed = functools.lru_cache(maxsize=8192)(lambda *texts: frozenset(map(ip_address, texts)))
_network = functools.lru_cache(maxsize=8192)(ip_network)


def _labels(intent: TenantIntent, port: Port | RemotePort) -> Mapping[str, str]:
    return intent.policy.labels.get(port.instance, {})
