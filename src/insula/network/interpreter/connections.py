"""Open connections: those that the rules let pass because connection tracking knows them (nf_conntrack)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from insula.network.interpreter.program import Attribute, Comparison, InstalledSet, Lookup, Program, RuleStep, Term


class OpenConnection(NamedTuple):
    """A connection that is open, as its first packet had it, and where its answers come from: the destination after
    translation. Ports are 0 where the protocol has none; `mark` is what rules have set."""

    source: str
    target: str
    protocol: int
    source_port: int
    port: int
    to: str
    to_port: int
    mark: int


def judged_marks(program: Program) -> frozenset[int]:
    """Return the marks of connections (ct mark) that a rule compares with: a connection with one of these may pass
    without being judged again."""
    return frozenset(
        int.from_bytes(packed, sys.byteorder)
        for table in program.tables
        for chain in table.chains.values()
        for rule in chain.rules
        for step in rule.steps
        for packed in _compared(step, table.sets)
    )


def _compared(step: RuleStep, sets: Mapping[str, InstalledSet]) -> Iterator[bytes]:
    """Yield the marks that a step compares that of the connection with."""
    if isinstance(step, Comparison) and _is_mark(step.term) and not step.negated and step.range.low == step.range.high:
        yield step.range.low.to_bytes(4, "big")
    elif isinstance(step, Lookup) and len(step.terms) == 1 and _is_mark(step.terms[0]) and step.set in sets:
        yield from (each.low for each in sets[step.set].elements)


def _is_mark(term: Term) -> bool:
    return isinstance(term, Attribute) and term.name == "ct mark"
