"""From a tenant's policies to the rules of egress by name, instance by instance.

A rule counts if its policy is in force (not in audit), is about direction out, selects the instance, and has a DNS name
among its peers. Its other peers, and rules without names, are compiled by the fabric; they matter here because what
they open is open without a check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from insula.model.errors import Invalid
from insula.model.objects import Port
from insula.model.policies import (
    AnyPeer,
    CidrPeer,
    GroupPeer,
    NamePeer,
    OperatorPolicy,
    Policy,
    PolicyPeer,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.names.patterns import parse_pattern
from insula.network.names.rules import (
    MAX_PORTS,
    ClientRules,
    DestinationRange,
    EgressRules,
    NameRule,
    OperatorRange,
    Protocol,
)

_EVERYWHERE = "0.0.0.0/0", "::/0"
_DNS = 53


def egress_rules(
    intent: TenantIntent,
    servers: Sequence[tuple[str, int]],
    own: Sequence[str],
    compiler: ClientCompiler | None = None,
) -> EgressRules:
    """Return the rules of all instances that have any. `servers` are the upstream name servers, and `own` are ranges of
    the host that names must not lead to, beside the tenant's subnets. Ports on networks without a way out have none.
    `compiler` is one for the same policies and groups."""
    compiler = compiler or ClientCompiler(intent.policy)
    closed = {network.name for network in intent.networks if network.outbound == "none"}
    ports = [port for port in intent.ports if port.network not in closed]
    clients = {
        instance: client
        for instance, addresses in _instances(ports).items()
        if (client := compiler.rules(intent.policy.labels.get(instance, {}), addresses))
    }
    if not clients:
        return EgressRules()
    for instance, addresses in _of_pairs(ports, clients).items():
        clients[instance] = msgspec.structs.replace(
            clients[instance], addresses=(*clients[instance].addresses, *addresses)
        )
    subnets = [subnet for network in intent.networks for subnet in (network.subnet, network.subnet6) if subnet]
    gateways = [gateway for network in intent.networks for gateway in (network.gateway, network.gateway6) if gateway]
    return EgressRules(
        clients,
        servers=tuple(servers),
        own_servers=tuple((gateway, _DNS) for gateway in gateways[:2]),
        own=(*subnets, *own),
        operator=tuple(_operator(intent.policy.operator)),
    )


class ClientCompiler:
    """Compiles the rules of instances by their labels, under the same policies and groups. What was compiled is kept:
    many instances have the same labels, and each time all policies are looked at."""

    def __init__(self, policy: PolicyIntent) -> None:
        self._policy = policy
        self._enforced = [each for each in policy.policies if not each.audit and "out" in each.directions]
        self._known: dict[frozenset[tuple[str, str]], ClientRules | None] = {}

    def fits(self, policy: PolicyIntent) -> bool:
        """Whether these are the same policies and groups."""
        return (policy.policies, policy.groups) == (self._policy.policies, self._policy.groups)

    def rules(self, labels: Mapping[str, str], addresses: Iterable[str]) -> ClientRules | None:
        """Return the rules of an instance with these labels and addresses; None if no rule with a name concerns it, or
        a policy closes DNS to it."""
        key = frozenset(labels.items())
        if key not in self._known:
            self._known[key] = self._compiled(labels)
        found = self._known[key]
        return found and ClientRules(tuple(addresses), found.rules, found.open)

    def _compiled(self, labels: Mapping[str, str]) -> ClientRules | None:
        concerning = [each for each in self._enforced if _selects(each.select, labels)]
        if not all(each.dns for each in concerning):
            return None
        rules = [rule for each in concerning for rule in each.rules if rule.direction == "out"]
        names = dict.fromkeys(found for rule in rules for found in _name_rules(rule))
        if not names:
            return None
        ranges = (found for rule in rules for peer in rule.peers for found in _ranges(self._policy, peer, rule.ports))
        return ClientRules((), tuple(names), tuple(dict.fromkeys(ranges)))


def has_names(policies: Iterable[Policy]) -> bool:
    """Whether a policy has a DNS name among its peers."""
    return any(isinstance(peer, NamePeer) for each in policies for rule in each.rules for peer in rule.peers)


def _instances(ports: Iterable[Port]) -> dict[str, list[str]]:
    """Return the addresses of all instances."""
    found: dict[str, list[str]] = {}
    for port in ports:
        found.setdefault(port.instance, []).extend([port.address, *([port.address6] if port.address6 else [])])
    return found


def _of_pairs(ports: Sequence[Port], clients: Mapping[str, ClientRules]) -> dict[str, list[str]]:
    """Return the single addresses that instances may use beside those of their ports. One that several may use (VRRP)
    is the first one's if all of them have the same rules; else nobody has names with it. Ranges are left out."""
    holders: dict[str, set[str]] = {}
    for port in ports:
        for pair in port.allowed_pairs:
            if "/" not in pair.address:
                holders.setdefault(pair.address, set()).add(port.instance)
    own = {address for port in ports for address in (port.address, port.address6)} if holders else set()
    found: dict[str, list[str]] = {}
    for address in sorted(holders.keys() - own):
        first, *others = sorted(holders[address])
        rules = [(client.rules, client.open) if (client := clients.get(each)) else None for each in (first, *others)]
        if rules[0] and all(each == rules[0] for each in rules):
            found.setdefault(first, []).append(address)
    return found


def _selects(selector: Selector, labels: Mapping[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.labels.items()):
        return False
    for each in selector.expressions:
        value = labels.get(each.key)
        if each.operator == "In" and value not in each.values:
            return False
        if each.operator == "NotIn" and value is not None and value in each.values:
            return False
        if (each.operator == "Exists") != (value is not None) and each.operator in ("Exists", "DoesNotExist"):
            return False
    return True


def check_rule(rule: PolicyRule) -> PolicyRule:
    """Return a rule with its names in canonical form. `Invalid` if a name is none, or its ports can't be leased."""
    if not any(isinstance(peer, NamePeer) for peer in rule.peers):
        return rule
    for match in rule.ports:
        if match.icmp_type is not None:
            raise Invalid("a rule with a DNS name has an ICMP type", "write icmp, which is all types")
        if match.port is not None and (match.end_port or match.port) - match.port >= MAX_PORTS:
            hint = f"list at most {MAX_PORTS} in a range, or leave them out for all ports"
            raise Invalid("a rule with a DNS name has too many ports", hint)
    peers = [
        msgspec.structs.replace(peer, name=str(parse_pattern(peer.name))) if isinstance(peer, NamePeer) else peer
        for peer in rule.peers
    ]
    return msgspec.structs.replace(rule, peers=peers)


# -- names -------------------------------------------------------------------------------------------------------------


def _name_rules(rule: PolicyRule) -> Iterator[NameRule]:
    for peer in rule.peers:
        if isinstance(peer, NamePeer):
            with contextlib.suppress(Invalid):  # `check_rule` refuses it when the policy is made
                pattern = str(parse_pattern(peer.name))
                yield from (NameRule(pattern, protocol, ports) for protocol, ports in _protocols(rule.ports))


def _protocols(matches: Sequence[PortMatch]) -> Iterator[tuple[Protocol, tuple[int, ...]]]:
    """Yield protocols and their ports; no ports are all. What can't be an element of a lease is left out: `check_rule`
    refuses it when the policy is made."""
    if not matches:
        yield from ((protocol, ()) for protocol in _ALL)
    for match in matches:
        if match.protocol in ("icmp", "icmpv6"):
            if match.icmp_type is None:
                yield match.protocol, ()
                if match.protocol == "icmp":
                    yield "icmpv6", ()
        elif match.port is None:
            yield match.protocol, ()
        elif (last := match.end_port or match.port) - match.port < MAX_PORTS:
            yield match.protocol, tuple(range(match.port, last + 1))


_ALL: tuple[Protocol, ...] = ("tcp", "udp", "icmp", "icmpv6")


# -- ranges ------------------------------------------------------------------------------------------------------------


def _ranges(policy: PolicyIntent, peer: PolicyPeer, matches: Sequence[PortMatch]) -> Iterator[DestinationRange]:
    """Yield what a peer lets an instance reach outside, whatever its name."""
    without: tuple[str, ...] = ()
    if isinstance(peer, AnyPeer):
        cidrs: Sequence[str] = _EVERYWHERE
    elif isinstance(peer, CidrPeer):
        cidrs, without = [peer.cidr], tuple(peer.exceptions)
    elif isinstance(peer, GroupPeer):
        cidrs = [cidr for group in policy.groups if group.name == peer.group for cidr in group.cidrs]
    else:
        return
    for cidr in cidrs:
        yield from (DestinationRange(cidr, protocol, ports, without) for protocol, ports in _port_ranges(matches))


def _port_ranges(matches: Sequence[PortMatch]) -> Iterator[tuple[Protocol | None, tuple[int, int] | None]]:
    if not matches:
        yield None, None
    for match in matches:
        if match.protocol in ("tcp", "udp"):
            ports = None if match.port is None else (match.port, match.end_port or match.port)
            yield match.protocol, ports


def _operator(policies: Iterable[OperatorPolicy]) -> Iterator[OperatorRange]:
    """Yield what the operator says about destinations, in the order of its rules."""
    for policy in policies:
        for rule in policy.rules:
            if rule.direction == "out":
                for peer in rule.peers:
                    ranges = _ranges(PolicyIntent(), peer, rule.ports)
                    yield from (OperatorRange(rule.action, each) for each in ranges)
