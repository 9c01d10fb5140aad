"""The compiler: from policies to numbers of classes, and what each class is granted.

For each direction there is a table of grants: what the addresses of a class (the *subject*, whom the policies select)
may exchange with those of another class, or with everybody. Several rules about the same two classes are one entry, by
the union of their ports. So the number of entries depends on classes and not on instances.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from insula.model.errors import Conflict
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
from insula.network.linux.policy.classes import EVERY_INSTANCE, Conditions, Range, RangePiece, conditions
from insula.network.linux.policy.numbers import port_set_numbers
from insula.network.linux.policy.population import ClassIndex, PolicyMember, Population, Refinement
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

    def with_others(self, others: frozenset[int]) -> list[int]:
        """Return the subjects that are granted something with one of these classes."""
        return [subject for subject, some in self.pairs.items() if not others.isdisjoint(some)]

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
    devices: dict[int, set[str]] = field(default_factory=dict)
    """The devices of the ports whose addresses are of a class."""
    port_sets: Mapping[int, PortSet] = field(default_factory=dict)

    def tables(self) -> list[Grants]:
        """Return the grants of both directions, enforced and in audit."""
        return [*self.enforced.values(), *self.audited.values()]


class CompiledChange(NamedTuple):
    """What differs between two compilations: the grants of some subjects, and classes that are finer."""

    subjects: set[int]
    finer: Refinement


MAX_PAIRS: Final = 65_536
"""Pairs of classes that one direction of a tenant's policies may have: they are memory of the kernel."""
NOBODY: Final[Conditions] = frozenset({("", "Exists", frozenset[str]())})
"""A selector that no policy has: no label has an empty name."""
LINK_LOCAL: Final = "fe80::/10"
"""The range of addresses that every network has (RFC 4291)."""


class Compiler:
    """One compilation of a tenant's policies, ports and networks. Conflict if there are too many pairs of classes."""

    def __init__(self, policy: PolicyIntent, networks: Iterable[Network], members: Iterable[PolicyMember]) -> None:
        self._policies = {each.name: each for each in policy.policies}
        self._groups = {group.name: group for group in policy.groups}
        self._rules = {name: _compiled_rules(each, self._groups) for name, each in self._policies.items()}
        self._subject = {name: conditions(each.select) for name, each in self._policies.items()}
        every_rule = [rule for by in self._rules.values() for rules in by.values() for rule in rules]
        self.population = Population(
            policy.labels,
            members,
            _subnets(networks),
            {*self._subject.values(), *(rule.selector for rule in every_rule if rule.selector is not None)},
            {rule.range for rule in every_rule if rule.range},
        )

    def run(self) -> Compiled:
        """Compile everything."""
        found, everybody = Compiled(), self.population
        found.subjects = {address: everybody.numbers[kind] for address, kind in everybody.addresses.items()}
        found.pieces, found.unknown = everybody.pieces(), everybody.vacant(everybody.kinds)
        found.devices, found.without_dns = everybody.devices(), self._without_dns()
        subjects = {n for n, kind in everybody.kinds.items() if kind.is_instance or kind.shared is not None}
        self._add_grants(found, subjects)
        return found

    def change(self, before: Compiled, policy: PolicyIntent) -> tuple[Compiled, CompiledChange] | None:
        """Compile other policies, groups and labels: what `run` or `change` has returned `before`, with the grants of
        some subjects replaced, and what has changed. None if that is too much; then everything has to be compiled
        anew."""
        relabelled = self.population.relabel(policy.labels)
        if relabelled is None:
            return None
        after, groups = {each.name: each for each in policy.policies}, {group.name: group for group in policy.groups}
        changed = self._changed(after, groups)
        rules = {name: _compiled_rules(after[name], groups) for name in changed if name in after}
        subject = {name: conditions(after[name].select) for name in changed if name in after}
        asked = [rule for by in rules.values() for some in by.values() for rule in some]
        selectors = {*subject.values(), *(rule.selector for rule in asked if rule.selector is not None)}
        finer = self.population.refine(selectors, {rule.range for rule in asked if rule.range})
        if finer is None:
            return None
        finer = relabelled.then(finer)
        selected = {self._subject.get(name, NOBODY) for name in changed} | {*subject.values()}
        concerned = {number for each in selected for number in self._classes.of(each)} | finer.after | finer.before
        concerned |= {number for each in selected for number in self._classes.shared(each)}
        self._policies, self._groups = after, groups
        for name in changed:
            self._rules.pop(name, None)
            self._subject.pop(name, None)
        self._rules |= rules
        self._subject |= subject
        if relabelled.after:
            concerned |= self._allowing(relabelled.after)
        found = replace(before, without_dns=self._without_dns())
        found.enforced, found.audited = dict(before.enforced), dict(before.audited)
        if finer != Refinement():
            concerned |= {subject for each in before.tables() for subject in each.with_others(finer.before)}
            self._move(found, finer)
        self._add_grants(found, concerned)
        return found, CompiledChange(concerned, finer)

    def _changed(self, after: Mapping[str, Policy], groups: Mapping[str, AddressGroup]) -> list[str]:
        """Return the names of policies that differ, or refer to a group that does."""
        other = {n for n in groups.keys() | self._groups.keys() if groups.get(n) != self._groups.get(n)}
        return [
            name
            for name in after.keys() | self._policies.keys()
            if not _same(after.get(name), self._policies.get(name)) or (other and _names(after.get(name), other))
        ]

    def _allowing(self, others: frozenset[int]) -> set[int]:
        """Return the subjects that rules allow to exchange something with some of these classes."""
        found = set[int]()
        for name, by in self._rules.items():
            rules = [rule for some in by.values() for rule in some]
            if any(not others.isdisjoint(_classes_of(rule, self._classes)) for rule in rules):
                found.update(self._classes.of(self._subject[name]))
        return found

    @property
    def _classes(self) -> ClassIndex:
        return self.population.classes_of

    def _move(self, found: Compiled, finer: Refinement) -> None:
        """Give addresses and pieces the classes that they have now."""
        numbers, addresses = self.population.numbers, self.population.addresses
        found.subjects = {**found.subjects, **{each: numbers[addresses[each]] for each in finer.addresses}}
        found.pieces = self.population.pieces()
        found.unknown = found.unknown - finer.before | self.population.vacant(finer.before | finer.after)
        moved = {address: self.population.device(address) for address in finer.addresses}
        others = {number: {*found.devices.get(number, ())}.difference(moved.values()) for number in finer.before}
        found.devices = {**found.devices, **others}
        for address, device in moved.items():
            number = found.subjects[address]
            found.devices[number] = {*found.devices.get(number, ()), *([device] if device else [])}

    def _without_dns(self) -> set[int]:
        out = [p for p in self._policies.values() if not p.audit and "out" in p.directions]
        deaf = [p for p in out if not p.dns or has_names([p])]
        return {number for policy in deaf for number in self._classes.of(self._subject[policy.name])}

    def _add_grants(self, found: Compiled, subjects: set[int]) -> None:
        """Replace the grants of some subjects. Sets of ports that are no longer used keep their numbers."""
        selecting, kinds = self._selecting(subjects), self.population.kinds
        shared = {number for number in selecting if kinds[number].shared is not None}
        collected = {
            (audit, direction): _collected(direction, self._rules, selecting, self._classes, shared, audit=audit)
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
            table[direction] = grants = grants.with_(each.numbered(numbers))
            _check_pairs(sum(map(len, grants.pairs.values())))

    def _selecting(self, subjects: set[int]) -> Mapping[int, Sequence[Policy]]:
        """Return the policies that select each of some classes, if it is still there, and of instances or shared."""
        by_subject: dict[Conditions, list[Policy]] = defaultdict(list)
        for name, policy in self._policies.items():
            by_subject[self._subject[name]].append(policy)
        found = {}
        for number in subjects:
            kind = self.population.kinds.get(number)
            selectors = (kind.selectors if kind.shared is None else kind.shared) if kind is not None else None
            if selectors is not None:
                found[number] = [p for each in (EVERY_INSTANCE, *selectors) for p in by_subject.get(each, ())]
        return found


def _classes_of(rule: CompiledRule, classes: ClassIndex) -> Iterable[int]:
    """Return the classes of a rule's peers."""
    if rule.range is not None:
        return classes.within(rule.range)
    return classes.of(rule.selector, rule.network) if rule.selector is not None else ()


def _names(policy: Policy | None, groups: set[str]) -> bool:
    """Whether rules of a policy refer to one of these groups."""
    peers = [peer for rule in policy.rules for peer in rule.peers] if policy else []
    return any(isinstance(peer, GroupPeer) and peer.group in groups for peer in peers)


def _same(one: Policy | None, other: Policy | None) -> bool:
    return one is other or one == other


def _collected(
    direction: Direction,
    rules: Mapping[str, Mapping[Direction, Sequence[CompiledRule]]],
    selecting: Mapping[int, Sequence[Policy]],
    classes: ClassIndex,
    shared: Container[int],
    *,
    audit: bool,
) -> _Collected:
    """Collect what a direction grants. With `audit`, subjects are those of policies in audit, and rules of such a
    policy count if it is the only one that selects a class: else what another one denies would not be seen. Nothing is
    granted to classes that are `shared`: what one of their instances may have, another may not."""
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
            _check_pairs(found.pairs)
            allowing = [] if subject in shared else granting
            found.add(subject, (rule for policy in allowing for rule in rules[policy.name][direction]), classes)
    return found


def _check_pairs(number: int) -> None:
    if number > MAX_PAIRS:
        what = f"the policies tell apart more than {MAX_PAIRS} pairs of kinds of instances, and of ranges"
        raise Conflict(what, "use fewer labels in selectors, fewer ranges in rules, or networks as peers")


class _Collected:
    """The grants of one direction while they are collected, by sets of ports."""

    def __init__(self) -> None:
        self.isolated: set[int] = set()
        self._to_all: dict[int, set[PortSet]] = defaultdict(set)
        self._pairs: dict[tuple[int, int], set[PortSet]] = defaultdict(set)
        self._unions: dict[frozenset[PortSet], PortSet] = {}

    def add(self, subject: int, rules: Iterable[CompiledRule], classes: ClassIndex) -> None:
        """Add what rules grant to a subject."""
        self.isolated.add(subject)
        for rule in rules:
            if rule.everybody:
                self._to_all[subject].add(rule.ports)
            else:
                for other in _classes_of(rule, classes):
                    self._pairs[subject, other].add(rule.ports)

    @property
    def pairs(self) -> int:
        """The number of pairs so far."""
        return len(self._pairs)

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
