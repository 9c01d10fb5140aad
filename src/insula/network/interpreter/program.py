"""Rules as conditions and effects on header fields, whatever installed them.

A rule is a list of steps: a condition that does not hold ends the rule, an effect changes a field, a verdict ends the
chain. Terms are the values that steps use: a part of the packet or of its connection, a constant, the result of a
map, or one of those with some bits changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from insula.network.interpreter.space import Boundaries, NumberRange

# -- terms ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Some bytes of a header. `base` is link, network or transport."""

    base: str
    offset: int
    length: int


@dataclass(frozen=True)
class Attribute:
    """A property that is in no header, such as ``iifname``, ``mark`` or ``ct state``."""

    name: str
    length: int


@dataclass(frozen=True)
class Constant:
    length: int
    value: int


@dataclass(frozen=True)
class LookupResult:
    """The value that a `Lookup` of the same rule has found; `number` tells which."""

    number: int
    length: int


@dataclass(frozen=True)
class Masked:
    of: Term
    mask: int
    xor: int

    @property
    def length(self) -> int:
        return self.of.length


@dataclass(frozen=True)
class Swapped:
    of: Term
    size: int

    @property
    def length(self) -> int:
        return self.of.length


@dataclass(frozen=True)
class Slice:
    of: Term
    start: int
    length: int


@dataclass(frozen=True)
class RouteDevice:
    """The device of the route to the destination, or with `reverse` to the source; its index, or with `present` whether
    there is one. `incoming`: only a route by the device of arrival counts.
    """

    reverse: bool
    incoming: bool
    present: bool
    length: int = 4


@dataclass(frozen=True)
class AddressType:
    """The kind of the route to the destination, or with `reverse` to the source (RTN_LOCAL and others)."""

    reverse: bool
    length: int = 4


@dataclass(frozen=True)
class Choice:
    """A number of the machine between two others, which depends on more than the class: a hash, a counter."""

    low: int
    high: int
    length: int = 4


@dataclass(frozen=True)
class Strange:
    """A value that is not known here."""

    what: str
    length: int


Term = (
    Load | Attribute | Constant | LookupResult | Masked | Swapped | Slice | RouteDevice | AddressType | Choice | Strange
)

# -- steps ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The condition that a term is in a range, or with `negated` outside of it."""

    term: Term
    range: NumberRange
    negated: bool = False


@dataclass(frozen=True)
class Lookup:
    """The condition that a set has an element with these terms. Of a map, the value is found as `number`, or it is the
    verdict."""

    terms: tuple[Term, ...]
    set: str
    negated: bool = False
    number: int | None = None
    verdict: bool = False


@dataclass(frozen=True)
class Assign:
    """The effect that a field gets a value."""

    field: str
    term: Term


@dataclass(frozen=True)
class Translate:
    """Network address translation, which accepts the packet too. A field that is None stays, or is that of the device
    (`own`)."""

    source: bool
    address: Term | None
    port: Term | None
    own: bool = False


@dataclass(frozen=True)
class Sometimes:
    """A condition that depends on more than the packet: a rate, a number of connections. A set that earlier packets
    have added elements to, which expire, is one as well."""

    what: str


@dataclass(frozen=True)
class Unknown:
    """A step that is not known here. It may be a condition, or anything else."""

    what: str


@dataclass(frozen=True)
class RuleVerdict:
    """The end of a rule. `jump`, `goto` and `return` are about chains; `continue` goes to the next rule."""

    kind: Literal["accept", "drop", "jump", "goto", "return", "continue"]
    chain: str = ""


RuleStep = Comparison | Lookup | Assign | Translate | Sometimes | Unknown | RuleVerdict


class RuleSteps(tuple[RuleStep, ...]):
    """The steps of a rule that many tables have: the same object, so that what is known of it is found quickly."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True)
class InstalledRule:
    """`handle` is the rule's number in its table."""

    handle: int
    steps: tuple[RuleStep, ...]


@dataclass(frozen=True)
class SetEntry:
    """An element: a range for each part of its key, and what a map has for it."""

    keys: tuple[NumberRange, ...]
    value: int | None = None
    verdict: RuleVerdict | None = None


@dataclass(frozen=True)
class InstalledChain:
    name: str
    hook: int | None
    priority: int
    type: str
    accepts: bool
    rules: Sequence[InstalledRule]
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class InstalledTable:
    """A table with its chains and sets by name."""

    family: str
    name: str
    chains: Mapping[str, InstalledChain]
    sets: Mapping[str, InstalledSet]


class Element(NamedTuple):
    """An element as bytes: the lowest and the highest key, and what a map has for it."""

    low: bytes
    high: bytes
    value: int | None = None
    verdict: RuleVerdict | None = None


class InstalledSet:
    """A set or map. `changes`: packets add elements, so that its contents are not known; `unsure`:
    elements expire, or match at some rate only.

    Parts of a concatenated key are padded to 4 bytes each; a rule tells how long they are.
    """

    def __init__(
        self, elements: Sequence[Element], value_length: int = 0, *, changes: bool = False, unsure: bool = False
    ) -> None:
        self.elements = tuple(elements)
        self.value_length = value_length
        self.changes = changes
        self.unsure = unsure
        self._entries: dict[tuple[int, ...], Sequence[SetEntry]] = {}
        self._indices: dict[tuple[int, ...], Mapping[int, Sequence[SetEntry]] | None] = {}

    def entries(self, lengths: tuple[int, ...]) -> Sequence[SetEntry]:
        """Return the elements, with the parts of their keys."""
        if lengths not in self._entries:
            self._entries[lengths] = [_entry(element, lengths) for element in self.elements]
        return self._entries[lengths]

    def index(self, lengths: tuple[int, ...]) -> Mapping[int, Sequence[SetEntry]] | None:
        """Return the entries by their first part; None if some first part is no single value."""
        if lengths not in self._indices:
            found: dict[int, list[SetEntry]] = {}
            for entry in self.entries(lengths):
                found.setdefault(entry.keys[0].low, []).append(entry)
            single = all(entry.keys[0].low == entry.keys[0].high for entry in self.entries(lengths))
            self._indices[lengths] = found if single else None
        return self._indices[lengths]


def _entry(element: Element, lengths: tuple[int, ...]) -> SetEntry:
    keys, at = [], 0
    for length in lengths:
        low, high = (int.from_bytes(each[at : at + length], "big") for each in (element.low, element.high))
        keys.append(NumberRange(low, high))
        at += -(-length // 4) * 4
    return SetEntry(tuple(keys), element.value, element.verdict)


@dataclass(frozen=True)
class Program:
    """All tables of one network stack."""

    tables: Sequence[InstalledTable] = field(default=())
    _choices: dict[Choice, Sequence[int]] = field(default_factory=dict, compare=False, repr=False)
    _boundaries: dict[int, Boundaries] = field(default_factory=dict, compare=False, repr=False)

    def choices(self, choice: Choice) -> Sequence[int]:
        """Return numbers that stand for all of a choice, in the order of bytes in memory: of those that no rule tells
        apart one. Numbers are told apart by the last part of the keys of sets, and by comparisons."""
        if choice not in self._choices:
            by_number: dict[bytes, list[object]] = {
                number.to_bytes(choice.length, sys.byteorder): [] for number in range(choice.low, choice.high + 1)
            }
            for table in self.tables:
                for name, elements in table.sets.items():
                    for each in elements.elements:
                        if (alike := by_number.get(each.low[-choice.length :])) is not None:
                            alike.append((id(table), name, each.low[: -choice.length], each.value, each.verdict))
            for rule in (r for table in self.tables for chain in table.chains.values() for r in chain.rules):
                for step in rule.steps:
                    if isinstance(step, Comparison) and step.term.length == choice.length:
                        for low in step.range:
                            by_number.get(low.to_bytes(choice.length, "big"), []).append(low)
            found: dict[tuple[object, ...], int] = {}
            for packed, alike in by_number.items():
                found.setdefault(tuple(alike), int.from_bytes(packed, "big"))
            self._choices[choice] = list(found.values())
        return self._choices[choice]

    def boundaries(self, version: int, find: Callable[[Boundaries], None]) -> Boundaries:
        """Return the boundaries of all rules for a version of IP, which `find` adds once."""
        if version not in self._boundaries:
            find(made := Boundaries(version))
            self._boundaries[version] = made
        return self._boundaries[version]

    def hooked(self, families: Sequence[str], hook: int) -> list[tuple[InstalledTable, InstalledChain]]:
        """Return the chains that run at a hook, in their order."""
        found = [
            (table, chain)
            for table in self.tables
            if table.family in families
            for chain in table.chains.values()
            if chain.hook == hook
        ]
        return sorted(found, key=lambda each: each[1].priority)
