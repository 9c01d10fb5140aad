"""The compiler: from policies to numbers of classes, and what each class is granted.

For each direction there is a table of grants: what the addresses of a class (the *subject*, whom the policies select)
may exchange with those of another class, or with everybody. Several rules about the same two classes are one entry, by
the union of their ports. So the number of entries depends on classes and not on instances.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from insula.model.objects import Network, Port
from insula.model.policies import (
    AddressGroup,
    AnyPeer,
    CidrPeer,
    Direction,
    GroupPeer,
    InstancePeer,
    Policy,
    PolicyPeer,
)
from insula.network.addresses import link_local
from insula.network.intent import PolicyIntent, RemotePort
from insula.network.linux.policy.classes import (
    EVERY_INSTANCE,
    AddressClass,
    AddressHolder,
    Conditions,
    Range,
    RangeMap,
    RangePiece,
    SelectorIndex,
    class_text,
    conditions,
)
from insula.network.linux.policy.numbers import class_numbers, port_set_numbers
from insula.network.linux.policy.port_sets import PortSet, port_set, text_of, union
from insula.network.names.compiler import has_names

DIRECTIONS: Sequence[Direction] = ("out", "in")


class CompiledRule(NamedTuple):
    """A rule without the policy's name: whom it allows to exchange what with the subjects of its policy. `network` is
    that of instances; `selector` is None if the peers are not instances, and `range` unless they are a range."""

    ports: PortSet
    everybody: bool = False
    selector: Conditions | None = None
    network: str | None = None
    range: Range | None = None


@dataclass
class Grants:
    """What one direction grants. `isolated` are the classes of subjects, which may only what is granted."""

    isolated: set[int] = field(default_factory=set)
    to_all: dict[int, int] = field(default_factory=dict)
    """The ports that a subject may exchange with everybody."""
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)
    """The ports of (subject, other)."""


@dataclass
class Compiled:
    """What is installed for the policies of a tenant. Classes and sets of ports are numbers."""

    subjects: dict[str, int] = field(default_factory=dict)
    """The class of each address of an instance."""
    pieces: Sequence[tuple[RangePiece, int]] = ()
    """The class of each range; those of instances are subjects too."""
    unknown: set[int] = field(default_factory=set)
    """The classes of addresses of networks that no instance has."""
    enforced: Mapping[Direction, Grants] = field(default_factory=dict)
    audited: Mapping[Direction, Grants] = field(default_factory=dict)
    """Subjects of policies in audit, and what would still be granted if these were enforced."""
    without_dns: set[int] = field(default_factory=set)
    port_sets: Mapping[int, PortSet] = field(default_factory=dict)


class PolicyMember(NamedTuple):
    """A port of the tenant, on this host or another: its instance, its network, its addresses, and the ranges that it
    may use beside these."""

    instance: str
    network: str
    addresses: tuple[str, ...]
    allowed: tuple[str, ...] = ()


LINK_LOCAL: Final = "fe80::/10"
"""The range of addresses that every network has (RFC 4291)."""


class Compiler:
    """One compilation of a tenant's policies, ports and networks."""

    def __init__(self, policy: PolicyIntent, networks: Iterable[Network], members: Iterable[PolicyMember]) -> None:
        self._policies = [*policy.policies]
        self.labels = policy.labels
        self._groups = {group.name: group for group in policy.groups}
        self._rules = {each.name: _compiled_rules(each, self._groups) for each in self._policies}
        self._subject = {each.name: conditions(each.select) for each in self._policies}
        every_rule = [rule for by in self._rules.values() for rules in by.values() for rule in rules]
        selectors = {*self._subject.values(), *(rule.selector for rule in every_rule if rule.selector is not None)}
        self._index = SelectorIndex(selectors)
        members = [*members]
        allowed = [(self._holder(member), cidr) for member in members for cidr in member.allowed]
        self._ranges = RangeMap({rule.range for rule in every_rule if rule.range}, _subnets(networks), allowed)
        self._address_classes = self._of_addresses(members)
        kinds = {*self._address_classes.values(), *(piece.kind for piece in self._ranges.pieces)}
        self._texts = {kind: class_text(kind) for kind in kinds}
        by_text = class_numbers(self._texts.values())
        self._numbers = {kind: by_text[text] for kind, text in self._texts.items()}
        self._members = _Members(self._numbers)

    def classes(self, member: PolicyMember) -> Iterator[tuple[str, AddressClass]]:
        """Yield the addresses of a port with their classes."""
        holder = self._holder(member)
        for address in member.addresses:
            yield address, AddressClass(holder.network, holder.selectors, self._ranges.ranges(address))

    def _holder(self, member: PolicyMember) -> AddressHolder:
        labels = self.labels.get(member.instance, {})
        return AddressHolder(member.network, frozenset(labels.items()), self._index.selecting(labels))

    def _of_addresses(self, members: Iterable[PolicyMember]) -> dict[str, AddressClass]:
        """Return the class of each address. A link-local one that several have, on two networks, is left out: it is
        unknown, so that nothing comes from it."""
        found: dict[str, AddressClass] = {}
        holders: dict[str, AddressHolder] = {}
        ambiguous = set()
        for member in members:
            holder = self._holder(member)
            for address, kind in self.classes(member):
                found[address] = kind
                if holders.setdefault(address, holder) != holder:
                    ambiguous.add(address)
        return {address: kind for address, kind in found.items() if address not in ambiguous}

    def number(self, kind: AddressClass) -> int | None:
        """Return the number of a class; None if no address of this compilation is of it."""
        return self._numbers.get(kind)

    def run(self) -> Compiled:
        """Compile everything."""
        enforced = {direction: self._grants(direction, audit=False) for direction in DIRECTIONS}
        audited = {direction: self._grants(direction, audit=True) for direction in DIRECTIONS}
        every = [ports for each in (*enforced.values(), *audited.values()) for ports in each.port_sets()]
        by_text = port_set_numbers({text_of(ports) for ports in every})
        numbers = {ports: by_text[text_of(ports)] for ports in every}
        # with names, queries are redirected (`linux.name_rules`), and those that are not must not get here
        deaf = [p for p in self._policies if not p.audit and "out" in p.directions and (not p.dns or has_names([p]))]
        return Compiled(
            subjects={address: self._numbers[kind] for address, kind in self._address_classes.items()},
            pieces=[(piece, self._numbers[piece.kind]) for piece in self._ranges.pieces],
            unknown={n for kind, n in self._numbers.items() if kind.network is not None and not kind.is_instance},
            enforced={direction: grants.numbered(numbers) for direction, grants in enforced.items()},
            audited={direction: grants.numbered(numbers) for direction, grants in audited.items()},
            without_dns={number for policy in deaf for number in self._members.of(self._subject[policy.name])},
            port_sets={number: ports for ports, number in numbers.items()},
        )

    def _grants(self, direction: Direction, *, audit: bool) -> _Collected:
        """Collect what a direction grants. With `audit`, subjects are those of policies in audit, and rules of such a
        policy count if it is the only one that selects a class: else what another one denies would not be seen."""
        found = _Collected()
        here = [each for each in self._policies if direction in each.directions]
        audits: dict[int, list[Policy]] = defaultdict(list)
        for policy in here:
            if policy.audit and audit:
                for number in self._members.of(self._subject[policy.name]):
                    audits[number].append(policy)
        for policy in here:
            rules, subjects = self._rules[policy.name][direction], self._members.of(self._subject[policy.name])
            if audit and policy.audit:
                subjects = [number for number in subjects if len(audits[number]) == 1]
            elif audit:
                subjects = [number for number in subjects if number in audits]
            elif policy.audit:
                continue
            found.add(subjects, rules, self._members)
        found.isolated.update(audits)
        return found


class _Members:
    """The numbers of classes by the conditions of rules."""

    def __init__(self, numbers: Mapping[AddressClass, int]) -> None:
        self._instances: dict[tuple[Conditions, str | None], list[int]] = defaultdict(list)
        self._within: dict[Range, list[int]] = defaultdict(list)
        for kind, number in numbers.items():
            for selector in (EVERY_INSTANCE, *kind.selectors) if kind.selectors is not None else ():
                self._instances[selector, None].append(number)
                self._instances[selector, kind.network].append(number)
            for range_ in kind.ranges:
                self._within[range_].append(number)

    def of(self, selector: Conditions, network: str | None = None) -> Sequence[int]:
        """Return the classes of the instances that a selector selects."""
        return self._instances.get((selector, network), ())

    def of_rule(self, rule: CompiledRule) -> Sequence[int]:
        """Return the classes of a rule's peers."""
        if rule.range is not None:
            return self._within.get(rule.range, ())
        return self.of(rule.selector, rule.network) if rule.selector is not None else ()


class _Collected:
    """The grants of one direction while they are collected, by sets of ports."""

    def __init__(self) -> None:
        self.isolated: set[int] = set()
        self._to_all: dict[int, set[PortSet]] = defaultdict(set)
        self._pairs: dict[tuple[int, int], set[PortSet]] = defaultdict(set)
        self._unions: dict[frozenset[PortSet], PortSet] = {}

    def add(self, subjects: Sequence[int], rules: Iterable[CompiledRule], members: _Members) -> None:
        """Add what rules grant to subjects."""
        self.isolated.update(subjects)
        for rule in rules:
            if rule.everybody:
                for subject in subjects:
                    self._to_all[subject].add(rule.ports)
                continue
            others = members.of_rule(rule)
            for subject in subjects:
                for other in others:
                    self._pairs[subject, other].add(rule.ports)

    def port_sets(self) -> Iterable[PortSet]:
        """Return the union for each entry."""
        return {self._union(sets) for sets in (*self._to_all.values(), *self._pairs.values())}

    def _union(self, sets: set[PortSet]) -> PortSet:
        key = frozenset(sets)
        if (found := self._unions.get(key)) is None:
            found = self._unions[key] = union(sets)
        return found

    def numbered(self, numbers: Mapping[PortSet, int]) -> Grants:
        """Return the grants with numbers of the sets of ports."""
        return Grants(
            isolated=self.isolated,
            to_all={subject: numbers[self._union(sets)] for subject, sets in self._to_all.items()},
            pairs={pair: numbers[self._union(sets)] for pair, sets in self._pairs.items()},
        )


def members_of(ports: Iterable[Port], remotes: Iterable[RemotePort] = ()) -> list[PolicyMember]:
    """Return the members of these ports. A remote one that is here too, because its instance has moved, is left out."""
    here = [member_of(port) for port in ports]
    known = {(each.network, each.instance) for each in here}
    for remote in remotes:
        if (remote.network, remote.instance) not in known:
            local = [link_local(remote.mac)] if any(":" in each for each in remote.addresses) else []
            here.append(PolicyMember(remote.instance, remote.network, (*remote.addresses, *local)))
    return here


def member_of(port: Port) -> PolicyMember:
    """Return the member of a port."""
    six = [port.address6, link_local(port.mac)] if port.address6 else []
    allowed = tuple(sorted(pair.address for pair in port.allowed_pairs))
    return PolicyMember(port.instance, port.network, (port.address, *six), allowed)


def _compiled_rules(policy: Policy, groups: Mapping[str, AddressGroup]) -> Mapping[Direction, Sequence[CompiledRule]]:
    found: dict[Direction, list[CompiledRule]] = {direction: [] for direction in DIRECTIONS}
    for rule in policy.rules:
        ports = port_set(rule.ports)
        found[rule.direction] += [each for peer in rule.peers if (each := _compiled_rule(peer, ports, groups))]
    return found


def _compiled_rule(peer: PolicyPeer, ports: PortSet, groups: Mapping[str, AddressGroup]) -> CompiledRule | None:
    """Return the rule for one peer; None for a name, whose addresses the resolver adds, and for an unknown group."""
    if isinstance(peer, AnyPeer):
        return CompiledRule(ports, everybody=True)
    if isinstance(peer, InstancePeer):
        return CompiledRule(ports, selector=conditions(peer.select), network=peer.network)
    if isinstance(peer, CidrPeer):
        return CompiledRule(ports, range=Range((peer.cidr,), tuple(sorted(peer.exceptions))))
    if isinstance(peer, GroupPeer) and peer.group in groups:
        return CompiledRule(ports, range=Range(tuple(sorted(groups[peer.group].cidrs))))
    return None


def _subnets(networks: Iterable[Network]) -> Iterator[tuple[str, str]]:
    yield "", LINK_LOCAL  # a network has a name, so none is of this class
    for network in networks:
        for subnet in (network.subnet, network.subnet6):
            if subnet:
                yield network.name, subnet
