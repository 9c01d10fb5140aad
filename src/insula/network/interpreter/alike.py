"""Find services that neither rules nor models tell apart. One of them stands for all.

Boundaries cut each field by itself, so every port of one side meets every port of the other. Most of these pairs meet
the same conditions in every rule. Two services are alike if each condition on protocols, ports, types and the
connection's state, with those before it in its rule, holds for both or for neither. Then a run does the same with both:
what it has changed before a rule is the same as well.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from insula.network.interpreter.fields import HeaderFields, State, initial, new_connection
from insula.network.interpreter.machine import Machine, Run, both
from insula.network.interpreter.program import (
    Assign,
    Attribute,
    Comparison,
    InstalledChain,
    InstalledSet,
    InstalledTable,
    Load,
    Lookup,
    Masked,
    Program,
    RuleStep,
    RuleVerdict,
    Slice,
    Swapped,
    Term,
    Translate,
)
from insula.network.interpreter.space import BITS, ECHO, Boundaries, NumberRange, Service, Space
from insula.network.interpreter.values import Hit, Symbolic

_OPEN: Final = {
    "iifname": 16, "oifname": 16, "iif": 4, "oif": 4, "smac": 6, "dmac": 6, "mark": 4, "priority": 4, "pkttype": 1,
}  # fmt: skip
"""Fields that do not depend on the service, or only by what rules have done; with their lengths."""
_MOST_REMEMBERED, _MOST_RULES = 256, 8192
"""Elements of a rule's sets, and rules, that results are remembered for."""
_OUTPUT: Final = 3  # NF_INET_LOCAL_OUT
_KNOWN_SOURCE_PORT: Final = 40000
_KNOWN_PORT: Final = 80


def representatives(program: Program, boundaries: Boundaries) -> list[Service]:
    """Return one service of each set of services that are alike, with the others as its `alike`."""
    services = boundaries.services()
    found = [(1 << len(services)) - 1]
    told = {*_Conditions(program, boundaries.version, services).sets()}
    for tell in boundaries.tells:
        told.update(tell(services))
    for bits in told:
        found = [part for each in found for part in (each & bits, each & ~bits) if part]
    sets = ([each for number, each in enumerate(services) if bits >> number & 1] for bits in found)
    version = boundaries.version
    return sorted(_with_others(max(some, key=lambda each: _example(each, version)), some) for some in sets)


def _with_others(one: Service, some: Sequence[Service]) -> Service:
    return one._replace(alike=tuple(each for each in some if each != one))


def _example(service: Service, version: int) -> tuple[bool, bool, int]:
    """Return how good an example a service is: an echo request, or a port that people know, from a usual one."""
    if service.has_ports and service.source and service.target:
        known = service.target.low <= _KNOWN_PORT <= service.target.high
        return service.source.low <= _KNOWN_SOURCE_PORT <= service.source.high, known, _size(service.target)
    return service.is_icmp and service.target == (ECHO[version], ECHO[version]), False, 0


def _size(range_: NumberRange) -> int:
    return range_.high - range_.low


class _Conditions(Machine):
    """The conditions of a program in a space that has services only. All other fields are unknown."""

    def __init__(self, program: Program, version: int, services: Sequence[Service]) -> None:
        space = Space(1, [NumberRange(0, (1 << BITS[version]) - 1)], services)
        super().__init__(program, space, HeaderFields(version, space))
        self._version = version
        self._memory = _memory(version, tuple(services))
        self._state = self._unknown_but_service(version, space)

    def _unknown_but_service(self, version: int, space: Space) -> State:
        state = initial(space, version)
        size = BITS[version] // 8
        for name, length in {**_OPEN, "saddr": size, "daddr": size}.items():
            state[name] = Symbolic(length, (), space.all)
        new_connection(state, space)
        for name in ("ct mark", "ct status", "ct direction"):
            state[name] = Symbolic(state[name].length, (), state[name].present)
        return state

    def sets(self) -> Iterator[int]:
        """Yield sets of services: two that are in the same sets are alike."""
        yield from (classes for _, _, classes in self._state["ct state"].parts)
        for table in self._program.tables:
            for chain in _running(table):
                for rule in chain.rules:
                    yield from self._known_of_rule(table, rule.steps)

    def _known_of_rule(self, table: InstalledTable, steps: Sequence[RuleStep]) -> frozenset[int]:
        """Return the sets of a rule. Tenants have mostly the same rules."""
        if not _asks_for_service(steps, self._version):
            return frozenset()
        names = _sets_of_services(steps, self._version)
        if sum(len(table.sets[name].elements) for name in names if name in table.sets) > _MOST_REMEMBERED:
            return frozenset(self._of_rule(table, steps))
        key = steps, tuple(_contents(table.sets.get(name)) for name in names)
        if key not in self._memory:
            if len(self._memory) > _MOST_RULES:
                self._memory.clear()
            self._memory[key] = frozenset(self._of_rule(table, steps))
        return self._memory[key]

    def _of_rule(self, table: InstalledTable, steps: Sequence[RuleStep]) -> Iterator[int]:
        run, hit = Run(table), Hit(self._space.all, self._space.all)
        for step in steps:
            if isinstance(step, Comparison):
                if _is_of_service(step.term, self._fields):
                    pieces = [load for load, _ in self._fields.pieces(step.term)]
                    if not all(_is_of_service(each, self._fields) for each in pieces):
                        yield from self._parts(pieces)
                    hit = both(hit, self._compare(run, step, self._state))
            elif isinstance(step, Lookup):
                yield from self._of_lookup(run, step, hit)
                if step.number is None and not step.verdict:
                    hit = self._after_lookup(run, step, hit)
            else:
                yield from hit
                if isinstance(step, Assign):
                    yield from self._parts([step.term])
                elif isinstance(step, Translate):
                    yield from self._parts([each for each in (step.address, step.port) if each is not None])
            if not hit.may:
                return
        yield from hit

    def _of_lookup(self, run: Run, step: Lookup, hit: Hit) -> Iterator[int]:
        """Yield the services of each element, and those that lack a field or may have anything in it: a look-up that is
        negated tells them from those that no element has."""
        of_service = [_is_of_service(term, self._fields) for term in step.terms]
        is_set = step.number is None and not step.verdict
        if not any(of_service) or (all(of_service) and is_set):
            return
        values = [self._value(term) for term in step.terms]
        yield from hit
        yield from (each & hit.may for value in values for each in (value.unknown, value.present))
        for _, found in self._matches(run, step, values, hit):
            yield from found

    def _after_lookup(self, run: Run, step: Lookup, hit: Hit) -> Hit:
        """Return where a rule goes on after a look-up, as far as that depends on the service."""
        if not any(_is_of_service(term, self._fields) for term in step.terms):
            return hit
        return both(hit, self._lookup(run, step, self._state, hit))

    def _value(self, term: Term) -> Symbolic:
        if _is_of_service(term, self._fields):
            return self._fields.value(term, self._state, {})
        return self._fields.unknown(term.length)

    def _parts(self, terms: Iterable[Term]) -> Iterator[int]:
        """Yield the services for each value of terms that are a field of the service."""
        for term in terms:
            if _is_of_service(term, self._fields):
                value = self._value(term)
                yield from (classes for _, _, classes in value.parts)
                yield value.unknown


def _running(table: InstalledTable) -> list[InstalledChain]:
    """Return the chains that packets which arrive may come to: not those that only packets of the stack itself do."""
    found = {name: chain for name, chain in table.chains.items() if chain.hook is not None and chain.hook != _OUTPUT}
    if table.family == "bridge":
        found |= {name: chain for name, chain in table.chains.items() if chain.hook is not None}
    left = list(found.values())
    while left:
        for name in _targets(left.pop(), table):
            if name in table.chains and name not in found:
                found[name] = table.chains[name]
                left.append(found[name])
    return list(found.values())


def _targets(chain: InstalledChain, table: InstalledTable) -> Iterator[str]:
    """Yield the chains that the rules of a chain jump to."""
    for rule in chain.rules:
        for step in rule.steps:
            if isinstance(step, RuleVerdict):
                yield step.chain
            elif isinstance(step, Lookup) and step.verdict and step.set in table.sets:
                yield from (each.verdict.chain for each in table.sets[step.set].elements if each.verdict)


@functools.lru_cache(maxsize=16)
def _memory(version: int, services: Sequence[Service]) -> dict[object, frozenset[int]]:
    """Return what is known of rules already, by their steps and the contents of their sets."""
    return {}


@functools.lru_cache(maxsize=8192)
def _asks_for_service(steps: Sequence[RuleStep], version: int) -> bool:
    """Whether a rule has any term that depends on the service."""
    fields = HeaderFields(version, Space(0, [], []))
    terms: list[Term | None] = []
    for step in steps:
        if isinstance(step, Comparison | Assign):
            terms.append(step.term)
        elif isinstance(step, Lookup):
            terms += step.terms
        elif isinstance(step, Translate):
            terms += (step.address, step.port)
    return any(term is not None and _is_of_service(term, fields) for term in terms)


@functools.lru_cache(maxsize=8192)
def _sets_of_services(steps: Sequence[RuleStep], version: int) -> Sequence[str]:
    """Return the names of the sets that a rule looks up services in."""
    fields = HeaderFields(version, Space(0, [], []))
    looked_up = [step for step in steps if isinstance(step, Lookup)]
    return [step.set for step in looked_up if any(_is_of_service(term, fields) for term in step.terms)]


def _contents(elements: InstalledSet | None) -> object:
    return None if elements is None else (elements.elements, elements.changes, elements.unsure)


def _is_of_service(term: Term, fields: HeaderFields) -> bool:
    """Whether a term is a field that depends on the service. The result of a look-up does, but in no other way than the
    look-up itself."""
    if isinstance(term, Masked | Swapped | Slice):
        return _is_of_service(term.of, fields)
    if isinstance(term, Load):
        if term.base == "transport":
            return True
        pieces = [load for load, _ in fields.pieces(term)] or [term]
        return any((where := fields.field_of(load)) and where[0] == "protocol" for load in pieces)
    return isinstance(term, Attribute) and term.name not in _OPEN
