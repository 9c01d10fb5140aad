"""`Machine`: runs rules on sets of packet classes.

It computes which classes the rules *may* let through. A rule that only may match (it has a condition on a rate, or a
step that is not known here) lets its classes pass if it accepts, and drops none of them. So a class that is not in the
result is certainly dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from insula.network.interpreter.fields import TRANSLATED, TRANSLATION, HeaderFields, State, host_order
from insula.network.interpreter.program import (
    Assign,
    Comparison,
    InstalledChain,
    InstalledRule,
    InstalledTable,
    Load,
    Lookup,
    Program,
    RuleStep,
    RuleVerdict,
    SetEntry,
    Slice,
    Sometimes,
    Translate,
    Unknown,
)
from insula.network.interpreter.space import Space
from insula.network.interpreter.values import Hit, Symbolic

_DEPTH = 16  # jumps inside of jumps (NFT_JUMP_STACK_SIZE)
_SOURCE_TRANSLATED, _TARGET_TRANSLATED = 1 << 4, 1 << 5  # IPS_SRC_NAT, IPS_DST_NAT (nf_conntrack_common.h)


class Passage(NamedTuple):
    """A rule that classes have come to and matched."""

    family: str
    table: str
    chain: str
    handle: int
    verdict: str
    classes: int


@dataclass
class Run:
    """The run of one base chain: the classes that were accepted, and those certainly dropped or translated."""

    table: InstalledTable
    accepted: int = 0
    dropped: int = 0
    translated: int = 0
    found: dict[int, Symbolic] = field(default_factory=dict)


class Machine:
    """`unknown` collects what was not understood, as text; `passages` the rules that matched, if asked for."""

    def __init__(self, program: Program, space: Space, fields: HeaderFields, own: Symbolic | None = None) -> None:
        """`own` is the address that translation gives to packets if rules name none: that of the device."""
        self._program = program
        self._space = space
        self._fields = fields
        self.own = own
        self.unknown: set[str] = set()
        self.passages: list[Passage] | None = None

    def hook(self, families: Sequence[str], hook: int, state: State, live: int, device: str | None = None) -> int:
        """Run all chains of a hook on the classes `live`, and return those that may pass. `state` is changed."""
        done = 0
        for table, chain in self._program.hooked(families, hook):
            if not live:
                break
            if chain.devices and device not in chain.devices:
                continue
            run = Run(table)
            if chain.type == "nat":  # a connection is translated once at a hook (nf_nat_inet_fn)
                live = live & done | self._base_chain(run, chain, state, live & ~done)
                done |= run.translated
            else:
                live = self._base_chain(run, chain, state, live)
        return live

    def _base_chain(self, run: Run, chain: InstalledChain, state: State, live: int) -> int:
        table = run.table
        rest = self._chain(run, chain, state, live, 0)
        if not chain.accepts:
            if self.passages is not None and rest:
                self.passages.append(Passage(table.family, table.name, chain.name, 0, "drop", rest))
            rest = 0
        return (run.accepted | rest) & live

    def _chain(self, run: Run, chain: InstalledChain, state: State, live: int, depth: int) -> int:
        """Run one chain; returns the classes that come to its end or return from it."""
        returned = 0
        for rule in chain.rules:
            if not live:
                break
            live, back = self._rule(run, chain, rule, state, live, depth)
            returned |= back
        return live | returned

    def _rule(
        self, run: Run, chain: InstalledChain, rule: InstalledRule, state: State, live: int, depth: int
    ) -> tuple[int, int]:
        """Run one rule; returns the classes that go on to the next rule, and those that leave the chain."""
        hit = Hit(live, live)
        for step in rule.steps:
            if isinstance(step, RuleVerdict):
                return self._verdict(run, chain, rule, step, state, live, hit, depth)
            if isinstance(step, Lookup) and step.verdict:
                return self._verdict_map(run, chain, rule, step, state, live, hit, depth)
            if isinstance(step, Translate):
                self._translate(step, state, hit, run)
                return self._verdict(run, chain, rule, RuleVerdict("accept"), state, live, hit, depth)
            hit = self._step(run, step, state, hit)
            if not hit.may:
                return live, 0
        return live, 0

    # -- conditions and effects ------------------------------------------------------------------------------------

    def _step(self, run: Run, step: RuleStep, state: State, hit: Hit) -> Hit:
        if isinstance(step, Comparison):
            return both(hit, self._compare(run, step, state))
        if isinstance(step, Lookup):
            return both(hit, self._lookup(run, step, state, hit))
        if isinstance(step, Assign):
            value = self._fields.value(step.term, state, run.found)
            if step.field in state and state[step.field].length == value.length:
                state[step.field] = state[step.field].assigned(hit, value)
            return hit
        if isinstance(step, Unknown):
            self.unknown.add(step.what)
            return Hit(0, hit.may)
        assert isinstance(step, Sometimes)
        return Hit(0, hit.may)

    def _compare(self, run: Run, step: Comparison, state: State) -> Hit:
        low, high = step.range
        single = low == high and isinstance(step.term, Load)
        pieces = self._fields.pieces(step.term, arp="arp operation" in state) if single else []
        if pieces:  # several fields at once
            found, present = Hit(self._space.all, self._space.all), self._space.all
            for load, offset in pieces:
                after = 8 * (step.term.length - offset - load.length)
                value = low >> after & (1 << 8 * load.length) - 1
                found = both(found, self._fields.value(load, state, run.found).within(value, value))
        else:
            whole = self._fields.value(step.term, state, run.found)
            found = whole.within(low, high)
            present = whole.present if step.negated else 0
        return _not(found, present) if step.negated else found

    def _lookup(self, run: Run, step: Lookup, state: State, hit: Hit) -> Hit:
        values = [self._fields.value(term, state, run.found) for term in step.terms]
        must = may = unknown = several = known = 0
        parts: list[tuple[int, int, int]] = []
        matches = self._matches(run, step, values, hit)
        for entry, found in matches:
            must |= found.must
            may |= found.may
            if entry.value is None:
                unknown |= found.may
            elif step.number is not None:
                parts.append((entry.value, entry.value, found.may))
        elements = run.table.sets.get(step.set)
        if elements is not None and not (elements.changes or elements.unsure):
            must |= _covered([entry for entry, _ in matches], values, hit)
        if step.number is not None:
            for _, _, bits in parts:
                several |= known & bits
                known |= bits
            run.found[step.number] = Symbolic(elements.value_length if elements else 4, parts, unknown, several)
        if not step.negated:
            return Hit(must, may)
        present, unsure = hit.may, 0
        for value in values:
            present &= value.present
            unsure |= value.unknown
        absent = _not(Hit(must, may), present)
        return Hit(absent.must & ~unsure, absent.may)  # an unknown field may be missing: then no condition holds

    def _matches(self, run: Run, step: Lookup, values: list[Symbolic], hit: Hit) -> list[tuple[SetEntry, Hit]]:
        """Return the elements of a set that packets of the classes may match, each with the classes."""
        elements = run.table.sets.get(step.set)
        if elements is None:
            self.unknown.add(f"set {step.set}, which is missing")
            return [(SetEntry(()), Hit(0, hit.may))]
        if elements.changes:
            if step.number is not None or not elements.unsure:  # else it is a condition like a rate: see `Sometimes`
                self.unknown.add(f"set {step.set}, which packets change")
            return [(SetEntry(()), Hit(0, hit.may))]
        lengths = tuple(term.length for term in step.terms)
        first = values[0]
        candidates: Sequence[SetEntry] = elements.entries(lengths)
        if len(candidates) > len(first.parts) and not first.unknown and (index := elements.index(lengths)) is not None:
            ranges = [part for part in first.parts if part[0] != part[1]]
            if not ranges:  # only elements for values that occur
                candidates = [entry for low, _, _ in first.parts for entry in index.get(low, ())]
        found, singles = [], [value.single() for value in values]
        for entry in candidates:  # this loop is a tenth of a proof
            must, may = hit
            for value, single, (low, high) in zip(values, singles, entry.keys, strict=True):
                if single is not None and low == high:
                    here = single.get(low, 0)
                    may &= here | value.unknown
                else:
                    here, possible = value.within(low, high)
                    may &= possible
                if not may:
                    break
                must &= here
            else:
                found.append((entry, Hit(0 if elements.unsure else must, may)))
        return found

    def _translate(self, step: Translate, state: State, hit: Hit, run: Run) -> None:
        run.translated |= hit.must
        address, port = ("saddr", "sport") if step.source else ("daddr", "dport")
        if step.own:
            own = self.own if self.own is not None else self._fields.unknown(state[address].length)
            state[address] = state[address].assigned(hit, own)
        elif step.address is not None:
            value = self._fields.value(step.address, state, run.found)
            if value.length == state[address].length:
                state[address] = state[address].assigned(hit, value)
        if step.port is not None:
            value = self._fields.value(step.port, state, run.found)
            state[port] = state[port].assigned(hit, value)
        elif step.source:
            state[port] = state[port].assigned(hit, self._fields.unknown(2))
        if "ct status" in state:
            status = host_order(_SOURCE_TRANSLATED if step.source else _TARGET_TRANSLATED, 4)
            before = state["ct status"]
            after = Symbolic(4, [(low | status, high | status, bits) for low, high, bits in before.parts])
            state["ct status"] = before.assigned(hit, after)
        if TRANSLATED in state and not step.source:
            to = self._translation(step, state, run)
            state[TRANSLATION] = state.get(TRANSLATION, Symbolic(to.length)).assigned(hit, to)
            state[TRANSLATED] = state[TRANSLATED].assigned(hit, Symbolic.constant(1, 1, self._space.all))

    def _translation(self, step: Translate, state: State, run: Run) -> Symbolic:
        """Return the address and the port of a translation together, if one look-up has found both."""
        address, port, length = step.address, step.port, state["daddr"].length + 2
        if not (isinstance(address, Slice) and isinstance(port, Slice) and address.of == port.of):
            return self._fields.unknown(length)
        whole = self._fields.value(address.of, state, run.found)
        parts = []
        for low, high, bits in whole.parts if not whole.unknown else ():
            if low == high:
                data = low.to_bytes(whole.length, "big")
                ends = (data[each.start : each.start + each.length] for each in (address, port))
                number = int.from_bytes(b"".join(ends), "big")
                parts.append((number, number, bits))
        known = Symbolic(length, parts)
        return Symbolic(length, parts, self._space.all & ~known.present, whole.several)

    # -- verdicts --------------------------------------------------------------------------------------------------

    def _verdict(
        self,
        run: Run,
        chain: InstalledChain,
        rule: InstalledRule,
        verdict: RuleVerdict,
        state: State,
        live: int,
        hit: Hit,
        depth: int,
    ) -> tuple[int, int]:
        if self.passages is not None and hit.may:
            name = f"{verdict.kind} {verdict.chain}".strip()
            self.passages.append(Passage(run.table.family, run.table.name, chain.name, rule.handle, name, hit.may))
        rest = live & ~hit.must
        if verdict.kind == "accept":
            run.accepted |= hit.may
            return rest, 0
        if verdict.kind == "drop":
            run.dropped |= hit.must
            return rest, 0
        if verdict.kind == "return":
            return rest, hit.may
        if verdict.kind == "continue":
            return live, 0
        target = run.table.chains.get(verdict.chain)
        if target is None or depth >= _DEPTH:
            self.unknown.add(f"chain {verdict.chain}")
            run.accepted |= hit.may
            return live, 0
        back = self._chain(run, target, state, hit.may, depth + 1)
        return (rest | back, 0) if verdict.kind == "jump" else (rest, back)

    def _verdict_map(
        self,
        run: Run,
        chain: InstalledChain,
        rule: InstalledRule,
        step: Lookup,
        state: State,
        live: int,
        hit: Hit,
        depth: int,
    ) -> tuple[int, int]:
        values = [self._fields.value(term, state, run.found) for term in step.terms]
        returned = 0
        for entry, found in self._matches(run, step, values, hit):
            if entry.verdict is None:  # not known
                run.accepted |= found.may
                continue
            within = Hit(found.must & live, found.may & live)
            kept, back = self._verdict(run, chain, rule, entry.verdict, state, within.may, within, depth)
            live = live & ~within.must | kept
            returned |= back
        return live, returned


def _covered(entries: Sequence[SetEntry], values: Sequence[Symbolic], hit: Hit) -> int:
    """Return the classes for which all values of a field that may have several are in a set."""
    open_ = [number for number, value in enumerate(values) if value.several & hit.must]
    if len(open_) != 1:
        return 0
    field_, found = values[open_[0]], dict[tuple[int, int], int]()
    for entry in entries:
        rest = hit.must
        for number, value in enumerate(values):
            if number != open_[0]:
                rest &= value.within(*entry.keys[number]).must
        key = entry.keys[open_[0]]
        found[key] = found.get(key, 0) | rest
    classes = field_.several & hit.must & ~field_.unknown
    for low, high, bits in field_.parts:
        classes &= ~bits | found.get((low, high), 0)
    return classes


def _not(hit: Hit, present: int) -> Hit:
    """Return where a condition does not hold, among the classes that have its fields."""
    return Hit(present & ~hit.may, present & ~hit.must)


def both(one: Hit, other: Hit) -> Hit:
    """Return where two conditions hold."""
    return Hit(one.must & other.must, one.may & other.may)
