"""The reference model of policies for whole sets of packets: `policy_model` asked about each atom once.

Atoms are cut at the borders of all ranges and ports in rules, so one packet of an atom stands for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from insula.model.policies import (
    AnyPeer,
    CidrPeer,
    Direction,
    GroupPeer,
    NamePeer,
    OperatorPolicy,
    PolicyRule,
    PortMatch,
)
from insula.network.intent import TenantIntent
from insula.network.interpreter.space import ICMP, ICMPV6, TCP, UDP, Boundaries, NumberRange, Service
from insula.network.ranges import address_text, range_of
from insula.network.reference import policy_model

_NAMES: Final = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmpv6"}
_OTHER: Final = "other"
_NUMBERS: Final = {"tcp": TCP, "udp": UDP}


def cut(intent: TenantIntent, into: Boundaries) -> None:
    """Add the borders of all ranges of addresses and ports in policies."""
    for rule in _rules(intent):
        for peer in rule.peers:
            if isinstance(peer, CidrPeer):
                _cut_ranges([peer.cidr, *peer.exceptions], into)
            elif isinstance(peer, GroupPeer):
                for group in intent.policy.groups:
                    _cut_ranges(group.cidrs if group.name == peer.group else [], into)
        for match in rule.ports:
            cut_port(match, into)


def cut_port(match: PortMatch, into: Boundaries) -> None:
    """Add the borders of a range of ports, or of an ICMP type."""
    if match.protocol in _NUMBERS and match.port is not None:
        into.targets[_NUMBERS[match.protocol]].add(match.port, match.end_port or match.port)
    elif match.icmp_type is not None:
        into.types.add(match.icmp_type, match.icmp_type)


def _cut_ranges(cidrs: Sequence[str], into: Boundaries) -> None:
    for cidr in cidrs:
        if (":" in cidr) == (into.version == 6):
            into.addresses.add(*range_of(cidr))


def _rules(intent: TenantIntent) -> Iterator[PolicyRule]:
    for policy in intent.policy.policies:
        yield from policy.rules
    for operator in intent.policy.operator:
        yield from (rule for _, rule in _of_operator(operator))


def _of_operator(policy: OperatorPolicy) -> Iterator[tuple[str, PolicyRule]]:
    """Yield the action and the rest of each rule of the operator."""
    for rule in policy.rules:
        yield rule.action, PolicyRule(direction=rule.direction, peers=list(rule.peers), ports=rule.ports)


class _Judged(NamedTuple):
    """A rule with the services that it is about."""

    action: str
    rule: PolicyRule
    services: int


class PolicyReference:
    """Which services policies allow between two addresses, as bits of `services`."""

    def __init__(self, intent: TenantIntent, version: int, services: Sequence[Service]) -> None:
        self._intent = intent
        self._version = version
        self._services = services
        self._all = (1 << len(services)) - 1
        self._policies = {p.name: (p, [self._judged("", rule) for rule in p.rules]) for p in intent.policy.policies}
        self._operator = [
            self._judged(action, rule) for p in intent.policy.operator for action, rule in _of_operator(p)
        ]
        self._selecting: dict[tuple[Direction, str], list[str]] = {}
        self._peers: dict[tuple[int, str], bool] = {}
        self._sending: dict[int, bool] = {}
        self._shared: dict[str, bool] = {}

    def allowed(self, source: int, target: NumberRange) -> int:
        """Return the services that may pass from an address to an atom of addresses."""
        if not self.sends(source):
            return 0
        if not self._policies and not self._operator:
            return self._all
        one, other = address_text(self._version, source), address_text(self._version, target.low)
        passing = self._direction("out", one, other) & self._direction("in", other, one)
        return self._by_operator(one, other, passing)

    def inside(self, source: int, target: NumberRange) -> int:
        """Return the services that may pass to an atom that is not outside, as a peer is: by the tenant's policies."""
        if not self.sends(source):
            return 0
        if not self._policies:
            return self._all
        one, other = address_text(self._version, source), address_text(self._version, target.low)
        return self._direction("out", one, other) & self._direction("in", other, one)

    def to_group(self, source: int, target: NumberRange) -> int:
        """Return the services that may pass from an address to everybody in its network. The operator's policies are
        not about these."""
        if not self.sends(source):
            return 0
        if not self._policies:
            return self._all
        return self._direction("out", address_text(self._version, source), address_text(self._version, target.low))

    def is_closed_to_groups(self, address: str) -> bool:
        """Whether an instance gets nothing that is sent to everybody: a policy selects it in direction in."""
        return bool(self._selecting_names("in", address))

    def sets(self) -> Iterator[int]:
        """Yield the services of each rule."""
        for judged in (each for _, some in self._policies.values() for each in some):
            yield judged.services
        for judged in self._operator:
            yield judged.services

    def kind(self, source: int) -> object:
        """Return what is the same for sources that policies allow the same: those that select it, the rules that it is
        a peer of, and whether it is the tenant's own."""
        subject = address_text(self._version, source)
        if not self.judges:
            return self.sends(source)
        rules = [each.rule for _, some in self._policies.values() for each in some]
        rules += [rule for _, rule, _ in self._operator]
        peers = tuple(self._is_peer(rule, subject) for rule in rules)
        inside = policy_model.is_inside(self._intent, subject)
        return tuple(self._selecting_names("out", subject)), peers, inside, self.sends(source)

    @property
    def judges(self) -> bool:
        """Whether there is any policy."""
        return bool(self._policies or self._operator)

    def ranges(self) -> Iterator[int]:
        """Yield the first address of each range in policies."""
        for rule in _rules(self._intent):
            for peer in rule.peers:
                if isinstance(peer, CidrPeer) and (":" in peer.cidr) == (self._version == 6):
                    yield range_of(peer.cidr).low
                elif isinstance(peer, GroupPeer):
                    for cidr in (c for group in self._intent.policy.groups for c in group.cidrs):
                        if (":" in cidr) == (self._version == 6):
                            yield range_of(cidr).low

    def passes(self, source: int, target: int, service: Service, port: NumberRange | None) -> bool:
        """Whether a packet that was translated may pass; `port` is that after translation."""
        if not self.judges:
            return self.sends(source)
        one, other = address_text(self._version, source), address_text(self._version, target)
        name = _NAMES.get(service.protocol.low, _OTHER)
        number = port.low if port else service.target.low if service.target else None
        return policy_model.permits(self._intent, one, other, name, number)

    def of_ports(self, ports: Sequence[PortMatch]) -> int:
        """Return the services that ports name; none at all name nothing."""
        if not ports:
            return 0
        return self._judged("", PolicyRule(direction="in", peers=[AnyPeer()], ports=[*ports])).services

    def named(self, source: int) -> int:
        """Return the services of rules with DNS names in the policies of an instance. Which addresses the names have is
        not known here: it depends on what the instance has asked for."""
        subject, found = address_text(self._version, source), 0
        for name in self._selecting_names("out", subject):
            for judged in self._policies[name][1]:
                if judged.rule.direction == "out" and any(isinstance(peer, NamePeer) for peer in judged.rule.peers):
                    found |= judged.services
        return found

    def sends(self, source: int) -> bool:
        """Whether anything may come from an address."""
        if source not in self._sending:
            self._sending[source] = policy_model.sends(self._intent, address_text(self._version, source))
        return self._sending[source]

    def _is_shared(self, subject: str) -> bool:
        if subject not in self._shared:
            self._shared[subject] = policy_model.is_shared(self._intent, subject)
        return self._shared[subject]

    def resolves(self, source: int) -> bool:
        """Whether an instance may use the resolver."""
        return policy_model.resolves(self._intent, address_text(self._version, source))

    def _direction(self, direction: Direction, subject: str, other: str) -> int:
        """Return the services that the policies which select the subject allow with another address."""
        if not (selecting := self._selecting_names(direction, subject)):
            return self._all
        passing = 0
        for name in () if self._is_shared(subject) else selecting:
            for judged in self._policies[name][1]:
                if judged.rule.direction == direction and self._is_peer(judged.rule, other):
                    passing |= judged.services
        return passing

    def _selecting_names(self, direction: Direction, subject: str) -> list[str]:
        """Return the names of the policies that are enforced and select an instance."""
        key = direction, subject
        if key not in self._selecting:
            self._selecting[key] = [
                name
                for name, (policy, _) in self._policies.items()
                if not policy.audit and policy_model.selects(self._intent, policy, direction, subject)
            ]
        return self._selecting[key]

    def _by_operator(self, source: str, target: str, passing: int) -> int:
        """Return what passes after the operator's rules, of which the first that matches decides."""
        if not self._operator:
            return passing
        inside = policy_model.is_inside
        if inside(self._intent, source) == inside(self._intent, target):
            return passing
        direction, other = ("out", target) if inside(self._intent, source) else ("in", source)
        undecided, found = self._all, 0
        for action, rule, services in self._operator:
            if rule.direction == direction and self._is_peer(rule, other):
                found |= undecided & services & {"accept": self._all, "deny": 0, "pass": passing}[action]
                undecided &= ~services
        return found | undecided & passing

    def _is_peer(self, rule: PolicyRule, address: str) -> bool:
        key = id(rule), address
        if key not in self._peers:
            any_port = msgspec.structs.replace(rule, ports=[])
            self._peers[key] = policy_model.rule_allows(self._intent, any_port, rule.direction, address, _OTHER, None)
        return self._peers[key]

    def _judged(self, action: str, rule: PolicyRule) -> _Judged:
        any_peer = msgspec.structs.replace(rule, peers=[AnyPeer()])
        found = 0
        for number, service in enumerate(self._services):
            name = _NAMES.get(service.protocol.low, _OTHER)
            port = service.target.low if service.target else None
            if policy_model.rule_allows(self._intent, any_peer, rule.direction, "192.0.2.1", name, port):
                found |= 1 << number
        return _Judged(action, rule, found)
