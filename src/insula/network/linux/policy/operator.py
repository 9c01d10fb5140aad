"""The compiler of the operator's rules: the first that matches decides.

The space of (address, protocol and port) is cut into cells in which all rules match or don't, and each cell gets the
action of its first rule. The addresses are those outside of the tenant, so that cells don't depend on what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from insula.model.policies import CidrPeer, Direction, OperatorPolicy
from insula.network.linux.policy.classes import NOWHERE, AddressClass, Range, RangeMap, RangePiece, class_text
from insula.network.linux.policy.numbers import UNKNOWN, class_numbers
from insula.network.linux.policy.port_sets import EVERYTHING, LAST, PROTOCOLS, PortInterval, PortSet, port_set

OTHER_PROTOCOLS: Final = 0
"""The cell of packets that are of no protocol with ports."""


class Cell(NamedTuple):
    """A class of addresses, and the number of an interval of ports (`interval_number`)."""

    address: int
    ports: int


class OperatorRuleForm(NamedTuple):
    """A rule of the operator: None as its ranges is every address."""

    action: Literal["accept", "deny", "pass"]
    direction: Direction
    ranges: frozenset[Range] | None
    ports: PortSet


@dataclass
class CompiledOperator:
    """What is installed for the operator's rules about a tenant."""

    pieces: Sequence[tuple[RangePiece, int]] = ()
    intervals: Sequence[PortInterval] = ()
    accepted: Mapping[Direction, set[Cell]] = field(default_factory=lambda: {"out": set(), "in": set()})
    denied: Mapping[Direction, set[Cell]] = field(default_factory=lambda: {"out": set(), "in": set()})


def compile_operator(policies: Iterable[OperatorPolicy]) -> CompiledOperator:
    """Compile policies that are in the order in which they are asked."""
    rules = [*_forms(policies)]
    if not rules:
        return CompiledOperator()
    pieces = RangeMap({each for rule in rules for each in rule.ranges or ()}, ()).pieces
    kinds = {piece.kind for piece in pieces}
    by_text = class_numbers(map(class_text, kinds))
    numbers = {kind: by_text[class_text(kind)] for kind in kinds} | {NOWHERE: UNKNOWN}
    found = CompiledOperator([(piece, numbers[piece.kind]) for piece in pieces], [*_intervals(rules)])
    for direction in ("out", "in"):
        here = [rule for rule in rules if rule.direction == direction]
        for kind, number in numbers.items():
            for interval in (None, *found.intervals):
                action = _first(here, kind, interval)
                cell = Cell(number, OTHER_PROTOCOLS if interval is None else interval_number(interval))
                if action == "accept":
                    found.accepted[direction].add(cell)
                elif action == "deny":
                    found.denied[direction].add(cell)
    return found


def interval_number(interval: PortInterval) -> int:
    """Return the number of an interval of ports, which no other of the same compilation has."""
    return interval.protocol << 16 | interval.first


def _forms(policies: Iterable[OperatorPolicy]) -> Iterator[OperatorRuleForm]:
    for policy in policies:
        for rule in policy.rules:
            cidrs = [peer for peer in rule.peers if isinstance(peer, CidrPeer)]
            every = len(cidrs) < len(rule.peers)
            ranges = None if every else frozenset(Range((p.cidr,), tuple(sorted(p.exceptions))) for p in cidrs)
            yield OperatorRuleForm(rule.action, rule.direction, ranges, port_set(rule.ports))


def _intervals(rules: Iterable[OperatorRuleForm]) -> Iterator[PortInterval]:
    """Cut the ports of each protocol at the bounds of all rules."""
    named = {interval for rule in rules if rule.ports != EVERYTHING for interval in rule.ports}
    for protocol in PROTOCOLS.values():
        starts = {0} | {each.first for each in named if each.protocol == protocol}
        starts |= {each.last + 1 for each in named if each.protocol == protocol and each.last < LAST}
        ordered = sorted(starts)
        for first, behind in zip(ordered, [*ordered[1:], LAST + 1], strict=True):
            yield PortInterval(protocol, first, behind - 1)


def _first(rules: Iterable[OperatorRuleForm], kind: AddressClass, interval: PortInterval | None) -> str | None:
    for rule in rules:
        if (rule.ranges is None or rule.ranges & kind.ranges) and _covers(rule.ports, interval):
            return rule.action
    return None


def _covers(ports: PortSet, interval: PortInterval | None) -> bool:
    if ports == EVERYTHING:
        return True
    return interval is not None and any(
        each.protocol == interval.protocol and each.first <= interval.first and interval.last <= each.last
        for each in ports
    )
