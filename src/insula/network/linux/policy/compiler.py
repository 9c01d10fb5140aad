"""The compiler: from policies to numbers of classes, and what each class is granted.

For each direction there is a table of grants: what the addresses of a class (the *subject*, whom the policies select)
may exchange with those of another class, or with everybody. Several rules about the same two classes are one entry, by
the union of their ports. So the number of entries depends on classes and not on instances.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from insula.network.linux import naming
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
    pairs: dict[int, dict[int, int]] = field(default_factory=dict)
    """The ports by subject, and by the other."""

    def without(self, subjects: set[int]) -> Grants:
        """Return the grants of other subjects."""
        return Grants(
            self.isolated - subjects,
            {s: ports for s, ports in self.to_all.items() if s not in subjects},
            {s: others for s, others in self.pairs.items() if s not in subjects},
        )

    def only(self, subjects: set[int]) -> Grants:
        """Return the grants of these subjects."""
        return Grants(
            self.isolated & subjects,
            {s: self.to_all[s] for s in subjects if s in self.to_all},
            {s: self.pairs[s] for s in subjects if s in self.pairs},
        )

    def with_(self, other: Grants) -> Grants:
        """Return the grants together with those of other subjects."""
        return Grants(self.isolated | other.isolated, self.to_all | other.to_all, self.pairs | other.pairs)


@dataclass
class Compiled:
    """What is installed for the policies of a tenant. Classes and sets of ports are numbers."""

    subjects: dict[str, int] = field(default_factory=dict)
    """The class of each address of an instance."""
    pieces: Sequence[tuple[RangePiece, int]] = ()
    """The class of each range; those of instances are subjects too."""
    unknown: set[int] = field(default_factory=set)
    """The classes of addresses of networks that no instance has."""
    enforced: dict[Direction, Grants] = field(default_factory=dict)
    audited: dict[Direction, Grants] = field(default_factory=dict)
    """Subjects of policies in audit, and what would still be granted if these were enforced."""
    without_dns: set[int] = field(default_factory=set)
    devices: Mapping[int, set[str]] = field(default_factory=dict)
    """The devices of the ports whose addresses are of a class."""
    port_sets: Mapping[int, PortSet] = field(default_factory=dict)


class PolicyMember(NamedTuple):
    """A port of the tenant, on this host or another: its instance, its network, its addresses, the ranges that it may
    use beside these, and its device, which is empty if it is on another host."""

    instance: str
    network: str
    addresses: tuple[str, ...]
    allowed: tuple[str, ...] = ()
    device: str = ""


NOBODY: Final[Conditions] = frozenset({("", "Exists", frozenset[str]())})
"""A selector that no policy has: no label has an empty name."""
LINK_LOCAL: Final = "fe80::/10"
"""The range of addresses that every network has (RFC 4291)."""


class Compiler:
    """One compilation of a tenant's policies, ports and networks."""

    def __init__(self, policy: PolicyIntent, networks: Iterable[Network], members: Iterable[PolicyMember]) -> None:
        self._policies = {each.name: each for each in policy.policies}
        self.labels = policy.labels
        self._groups = {group.name: group for group in policy.groups}
        self._rules = {name: _compiled_rules(each, self._groups) for name, each in self._policies.items()}
        self._subject = {name: conditions(each.select) for name, each in self._policies.items()}
        every_rule = [rule for by in self._rules.values() for rules in by.values() for rule in rules]
        self._selectors = {EVERY_INSTANCE, *self._subject.values()}
        self._selectors |= {rule.selector for rule in every_rule if rule.selector is not None}
        self._asked = {rule.range for rule in every_rule if rule.range}
        self._index = SelectorIndex(self._selectors)
        members = [*members]
        allowed = [(self._holder(member), cidr) for member in members for cidr in member.allowed]
        self._ranges = RangeMap(self._asked, _subnets(networks), allowed)
        self._address_classes = self._of_addresses(members)
        self._local = [member for member in members if member.device]
        kinds = {*self._address_classes.values(), *(piece.kind for piece in self._ranges.pieces)}
        self._texts = {kind: class_text(kind) for kind in kinds}
        by_text = class_numbers(self._texts.values())
        self._numbers = {kind: by_text[text] for kind, text in self._texts.items()}
        self._kinds = {number: kind for kind, number in self._numbers.items()}
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

    def _devices(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = defaultdict(set)
        for member in self._local:
            for _, kind in self.classes(member):
                found[self._numbers[kind]].add(member.device)
        return found

    def number(self, kind: AddressClass) -> int | None:
        """Return the number of a class; None if no address of this compilation is of it."""
        return self._numbers.get(kind)

    def run(self) -> Compiled:
        """Compile everything."""
        found = Compiled(
            subjects={address: self._numbers[kind] for address, kind in self._address_classes.items()},
            pieces=[(piece, self._numbers[piece.kind]) for piece in self._ranges.pieces],
            unknown={n for kind, n in self._numbers.items() if kind.network is not None and not kind.is_instance},
            without_dns=self._without_dns(),
            devices=self._devices(),
        )
        self._add_grants(found, {number for number, kind in self._kinds.items() if kind.is_instance})
        return found

    def change(self, before: Compiled, policies: Iterable[Policy]) -> tuple[Compiled, set[int]] | None:
        """Compile other policies for the classes that there are: what `run` or `change` has returned `before`, with the
        grants of some subjects replaced, and these subjects. None if the classes don't suffice."""
        after = {each.name: each for each in policies}
        changed = [n for n in after.keys() | self._policies.keys() if not _same(after.get(n), self._policies.get(n))]
        rules = {name: _compiled_rules(after[name], self._groups) for name in changed if name in after}
        subject = {name: conditions(after[name].select) for name in changed if name in after}
        asked = [rule for by in rules.values() for some in by.values() for rule in some]
        known = {*subject.values()} <= self._selectors
        known &= all(rule.selector is None or rule.selector in self._selectors for rule in asked)
        if not known or not all(rule.range is None or rule.range in self._asked for rule in asked):
            return None
        concerned = {number for name in changed for number in self._members.of(self._subject.get(name, NOBODY))}
        concerned |= {number for each in subject.values() for number in self._members.of(each)}
        self._policies = after
        for name in changed:
            self._rules.pop(name, None)
            self._subject.pop(name, None)
        self._rules |= rules
        self._subject |= subject
        found = replace(before, without_dns=self._without_dns())
        found.enforced, found.audited = dict(before.enforced), dict(before.audited)
        self._add_grants(found, concerned)
        return found, concerned

    def _without_dns(self) -> set[int]:
        out = [p for p in self._policies.values() if not p.audit and "out" in p.directions]
        deaf = [p for p in out if not p.dns or has_names([p])]
        return {number for policy in deaf for number in self._members.of(self._subject[policy.name])}

    def _add_grants(self, found: Compiled, subjects: set[int]) -> None:
        """Replace the grants of some subjects. Sets of ports that are no longer used keep their numbers."""
        selecting = self._selecting(subjects)
        collected = {
            (audit, direction): _collected(direction, self._rules, selecting, self._members, audit=audit)
            for audit in (False, True)
            for direction in DIRECTIONS
        }
        sets = {ports for each in collected.values() for ports in each.port_sets()}
        numbers = {ports: number for number, ports in found.port_sets.items()}
        new = {text_of(ports): ports for ports in sets if ports not in numbers}
        numbers |= {new[text]: n for text, n in port_set_numbers(new, found.port_sets).items()}
        found.port_sets = {number: ports for ports, number in numbers.items()}
        for (audit, direction), each in collected.items():
            table = found.audited if audit else found.enforced
            grants = table[direction].without(subjects) if direction in table else Grants()
            table[direction] = grants.with_(each.numbered(numbers))

    def _selecting(self, subjects: set[int]) -> Mapping[int, Sequence[Policy]]:
        """Return the policies that select each of some classes."""
        by_subject: dict[Conditions, list[Policy]] = defaultdict(list)
        for name, policy in self._policies.items():
            by_subject[self._subject[name]].append(policy)
        found = {}
        for number in subjects:
            selectors = self._kinds[number].selectors or frozenset()
            found[number] = [p for each in (EVERY_INSTANCE, *selectors) for p in by_subject.get(each, ())]
        return found


def _same(one: Policy | None, other: Policy | None) -> bool:
    return one is other or one == other


def _collected(
    direction: Direction,
    rules: Mapping[str, Mapping[Direction, Sequence[CompiledRule]]],
    selecting: Mapping[int, Sequence[Policy]],
    members: _Members,
    *,
    audit: bool,
) -> _Collected:
    """Collect what a direction grants. With `audit`, subjects are those of policies in audit, and rules of such a
    policy count if it is the only one that selects a class: else what another one denies would not be seen."""
    found = _Collected()
    for subject, policies in selecting.items():
        here = [policy for policy in policies if direction in policy.directions]
        audits = [policy for policy in here if policy.audit]
        if audit and not audits:
            continue
        granting = [policy for policy in here if not policy.audit]
        if audit and len(audits) == 1:
            granting += audits
        if granting or audit:
            found.add(subject, (rule for policy in granting for rule in rules[policy.name][direction]), members)
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

    def add(self, subject: int, rules: Iterable[CompiledRule], members: _Members) -> None:
        """Add what rules grant to a subject."""
        self.isolated.add(subject)
        for rule in rules:
            if rule.everybody:
                self._to_all[subject].add(rule.ports)
            else:
                for other in members.of_rule(rule):
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
            pairs=self._pairs_by_subject(numbers),
        )

    def _pairs_by_subject(self, numbers: Mapping[PortSet, int]) -> dict[int, dict[int, int]]:
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for (subject, other), sets in self._pairs.items():
            found[subject][other] = numbers[self._union(sets)]
        return dict(found)


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
    return PolicyMember(port.instance, port.network, (port.address, *six), allowed, naming.port(port.index))


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
