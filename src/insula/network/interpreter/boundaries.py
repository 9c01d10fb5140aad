"""Find the boundaries of a program: the numbers at which its rules treat addresses, ports and types differently."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from insula.network.interpreter.fields import ETHERTYPE, HeaderFields
from insula.network.interpreter.program import (
    Attribute,
    Comparison,
    Element,
    InstalledSet,
    Load,
    Lookup,
    Masked,
    Program,
    RuleStep,
    Slice,
    Term,
)
from insula.network.interpreter.space import ICMP, ICMPV6, TCP, UDP, Boundaries, NumberRange, Space

_PORTS: Final = {
    "sport": "source",
    "dport": "target",
    "ct original proto-src": "source",
    "ct reply proto-dst": "source",
    "ct original proto-dst": "target",
    "ct reply proto-src": "target",
}
_MOST_REMEMBERED: Final = 256
"""Elements of sets that the boundaries of a rule are remembered for."""
_ADDRESSES: Final = frozenset(
    ("saddr", "daddr", "ct original saddr", "ct original daddr", "ct reply saddr", "ct reply daddr")
)


def collect(program: Program, into: Boundaries) -> None:
    """Add all boundaries of a program. A missing one makes results coarser, and never wrong."""
    into.include(program.boundaries(into.version, lambda found: _find(program, found)))


def _find(program: Program, into: Boundaries) -> None:
    for table in program.tables:
        for chain in table.chains.values():
            for rule in chain.rules:
                names = _looked_up(rule.steps, into.version)
                contents = tuple(_contents(table.sets.get(name)) for name in names)
                of_rule = _of_rule if sum(map(len, contents)) <= _MOST_REMEMBERED else _of_rule.__wrapped__
                if found := of_rule(rule.steps, into.version, contents):
                    into.include(found)


@functools.lru_cache(maxsize=4096)
def _of_rule(steps: Sequence[RuleStep], version: int, contents: Sequence[Sequence[Element]]) -> Boundaries | None:
    """Return the boundaries of a rule, None if it has none; those of tenants are mostly the same. `contents` are those
    of the sets that it looks up."""
    into, fields, left = Boundaries(version), HeaderFields(version, Space(0, [], [])), iter(contents)
    none = into.count()
    protocols: Iterable[int] = ()
    for step in steps:
        if isinstance(step, Comparison):
            if _excludes(step, version):
                break
            protocols = _protocols(step) or protocols
            _add(_parts(step.term, version), step.range, into, protocols)
        elif isinstance(step, Lookup) and (wanted := _wanted(step, fields)):
            elements = InstalledSet(next(left))
            parts = [(number, _parts(step.terms[number], version)) for number in wanted]
            protocol_at = [number for number, term in enumerate(step.terms) if term in _PROTOCOL]
            for entry in elements.entries(tuple(term.length for term in step.terms)):
                named = [entry.keys[at].low for at in protocol_at if entry.keys[at].low == entry.keys[at].high]
                for number, of_term in parts:
                    _add(of_term, entry.keys[number], into, named or protocols)
    return into if into.count() > none else None


@functools.lru_cache(maxsize=8192)
def _looked_up(steps: Sequence[RuleStep], version: int) -> Sequence[str]:
    """Return the names of the sets whose contents matter to a rule's boundaries."""
    fields = HeaderFields(version, Space(0, [], []))
    return [step.set for step in steps if isinstance(step, Lookup) and _wanted(step, fields)]


def _wanted(step: Lookup, fields: HeaderFields) -> list[int]:
    """Return the numbers of the terms that are of a field which is cut into atoms."""
    return [number for number, term in enumerate(step.terms) if _matters(term, fields)]


def _contents(elements: InstalledSet | None) -> Sequence[Element]:
    return () if elements is None or elements.changes else elements.elements


def _excludes(step: Comparison, version: int) -> bool:
    """Whether a rule that has this condition is about packets of another version of IP, or ARP."""
    wanted = {
        Attribute("nfproto", 1): {4: 2, 6: 10}[version],
        Attribute("ethertype", 2): ETHERTYPE[version],
        Load("link", 12, 2): ETHERTYPE[version],
    }.get(step.term)
    return wanted is not None and not step.negated and not step.range.low <= wanted <= step.range.high


_OTHERS: Final = frozenset(
    ("iifname", "oifname", "mark", "priority", "ct mark", "nfproto", "ethertype", "smac", "dmac")
)


def _matters(term: Term, fields: HeaderFields) -> bool:
    """Whether a term is of a field that is cut into atoms."""
    named = _named(term, fields)
    return named is not None and named[0] not in _OTHERS


def _protocols(step: Comparison) -> tuple[int, ...]:
    """Return the protocol that a comparison restricts a rule to."""
    if step.term in _PROTOCOL and not step.negated and step.range.low == step.range.high:
        return (step.range.low,)
    return ()


_PROTOCOL: Final = (Attribute("l4proto", 1), Load("network", 9, 1), Load("network", 6, 1))


def _named(term: Term, fields: HeaderFields) -> tuple[str, int, int, int] | None:
    """Return the field that a term is of: its name, its length, the beginning and the length of the part."""
    if isinstance(term, Attribute):
        return term.name, term.length, 0, term.length
    if isinstance(term, Slice):
        inner = _named(term.of, fields)
        return None if inner is None else (inner[0], inner[1], inner[2] + term.start, term.length)
    if isinstance(term, Masked):
        return _named(term.of, fields)
    if isinstance(term, Load):
        if term.base == "transport":
            at = {(0, 2): "sport", (2, 2): "dport", (0, 1): "type", (1, 1): "code"}.get((term.offset, term.length))
            return None if at is None else (at, term.length, 0, term.length)
        if where := fields.field_of(term):
            name, offset, length = where
            return name, length, term.offset - offset, term.length
    return None


class _Part(NamedTuple):
    """A part of a term that is a field, or the beginning of one: which, with its length; how many bits of the term are
    behind it, None if it is the whole term; and how many bits of the field are behind it, and which a mask hides."""

    name: str
    length: int
    behind: int | None
    mask: int
    after: int
    hole: int


def _add(parts: Sequence[_Part], range_: NumberRange, into: Boundaries, protocols: Iterable[int]) -> None:
    """Add the borders of a range of values that a term of these parts is compared with."""
    for name, length, behind, mask, after, hole in parts:
        low, high = range_ if behind is None else [range_.low >> behind & mask] * 2
        _cut(name, length, low << after, (high | hole) << after | (1 << after) - 1, into, tuple(protocols))


@functools.lru_cache(maxsize=4096)
def _parts(term: Term, version: int) -> Sequence[_Part]:
    """Return the fields that a term consists of, without those of which it has lower bytes alone: not a range."""
    fields, found = HeaderFields(version, Space(0, [], [])), []
    pieces: list[tuple[Term, int | None]] = [
        (load, 8 * (term.length - offset - load.length)) for load, offset in fields.pieces(term)
    ]
    for part, behind in pieces or [(term, None)]:
        if (named := _named(part, fields)) and not named[2]:
            name, length, _, size = named
            found.append(_Part(name, length, behind, (1 << 8 * part.length) - 1, 8 * (length - size), _hole(part)))
    return found


def _hole(term: Term) -> int:
    """Return the bits that a mask hides at the end of a value."""
    if isinstance(term, Masked):
        hole = (1 << 8 * term.length) - 1 ^ term.mask
        return hole if hole & (hole + 1) == 0 else 0
    return 0


def _cut(name: str, length: int, low: int, high: int, into: Boundaries, protocols: tuple[int, ...]) -> None:
    if name in _ADDRESSES:
        if length == (4 if into.version == 4 else 16):
            into.addresses.add(low, high)
    elif name == "ct original proto-dst" and (ICMP in protocols or ICMPV6 in protocols):
        into.types.add(low >> 8, high >> 8)
        if (low & 0xFF, high & 0xFF) != (0, 0xFF):
            into.codes.add(low & 0xFF, high & 0xFF)
    elif name in _PORTS:
        side = into.sources if _PORTS[name] == "source" else into.targets
        for protocol in (TCP, UDP):
            if not protocols or protocol in protocols:
                side[protocol].add(low, high)
    elif name in ("type", "code"):
        if not protocols or ICMP in protocols or ICMPV6 in protocols:
            (into.types if name == "type" else into.codes).add(low, high)
    elif name in ("l4proto", "protocol"):
        into.protocols.add(low, high)
