"""Make programs of nftables' expressions (include/uapi/linux/netfilter/nf_tables.h).

The registers of a rule are followed symbolically: each holds a term. What an expression does that is not known here is
not guessed: it becomes an `Unknown` step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Final

from insula.kernel.netlink import attributes, rulesets
from insula.kernel.netlink.rulesets import RawElement, RawExpression, RawRule, RawSet, RawTable
from insula.network.interpreter.program import (
    AddressType,
    Assign,
    Attribute,
    Choice,
    Comparison,
    Constant,
    Element,
    InstalledChain,
    InstalledRule,
    InstalledSet,
    InstalledTable,
    Load,
    Lookup,
    LookupResult,
    Masked,
    Program,
    RouteDevice,
    RuleStep,
    RuleSteps,
    RuleVerdict,
    Slice,
    Sometimes,
    Strange,
    Swapped,
    Term,
    Translate,
    Unknown,
)
from insula.network.interpreter.space import NumberRange

_BASES: Final = {0: "link", 1: "network", 2: "transport"}
_META: Final = {  # key: (name, length)
    1: ("ethertype", 2),
    2: ("priority", 4),
    3: ("mark", 4),
    4: ("iif", 4),
    5: ("oif", 4),
    6: ("iifname", 16),
    7: ("oifname", 16),
    15: ("nfproto", 1),
    16: ("l4proto", 1),
    17: ("bridge iifname", 16),
    18: ("bridge oifname", 16),
    19: ("pkttype", 1),
}
_CT: Final = {0: ("ct state", 4), 1: ("ct direction", 1), 2: ("ct status", 4), 3: ("ct mark", 4)}
_CT_TUPLE: Final = {8: "saddr", 9: "daddr", 11: "proto-src", 12: "proto-dst", 19: "saddr", 20: "daddr", 21: "saddr"}
_CT_TUPLE6: Final = {22: "daddr"}
_NUMBERS: Final = {2: 1, 3: 4, 4: 4, 5: 4, 15: 1, 16: 1}
_IGNORED: Final = frozenset({"counter", "log", "last", "notrack"})
_SOMETIMES: Final = frozenset({"limit", "connlimit", "quota", "dynset"})
_VERDICTS: Final = {0: "drop", 1: "accept", -1: "continue", -2: "continue", -3: "jump", -4: "goto", -5: "return"}
_MOST_CHOICES: Final = 4096
_ADDRESS: Final = {2: 4, 10: 16}  # bytes, by NFPROTO


def program(tables: Sequence[RawTable]) -> Program:
    """Return the program of all tables that are active."""
    return Program([_table(each) for each in tables if each.active])


def _table(raw: RawTable) -> InstalledTable:
    sets = _lengths(tuple((name, each.key_length, each.data_length) for name, each in raw.sets.items()))
    chains = {
        chain.name: InstalledChain(
            name=chain.name,
            hook=chain.hook,
            priority=chain.priority,
            type=chain.type,
            accepts=chain.accepts,
            rules=[_rule(rule, raw.family, sets) for rule in raw.rules.get(chain.name, ())],
            devices=chain.devices,
        )
        for chain in raw.chains.values()
    }
    return InstalledTable(raw.family, raw.name, chains, {name: installed_set(each) for name, each in raw.sets.items()})


# -- sets ----------------------------------------------------------------------------------------------------------


def installed_set(raw: RawSet) -> InstalledSet:
    """Return a set with its elements as ranges."""
    changes = bool(raw.flags & rulesets.SET_EVAL)
    elements = _intervals(raw) if raw.flags & rulesets.SET_INTERVAL and len(raw.fields) < 2 else _exact(raw)
    unsure = bool(raw.flags & rulesets.SET_TIMEOUT or raw.expressions - _IGNORED)
    return InstalledSet(elements, raw.data_length, changes=changes, unsure=unsure)


def _exact(raw: RawSet) -> list[Element]:
    found = []
    for each in raw.elements:
        if each.flags & rulesets.ELEMENT_CATCHALL:
            found.append(_element(each, bytes(raw.key_length), b"\xff" * raw.key_length))
        else:
            found.append(_element(each, each.key, each.end or each.key))
    return found


def _intervals(raw: RawSet) -> list[Element]:
    """Return the ranges of a set with the flag interval, which the kernel keeps as beginnings and ends (an end is the
    first key that is outside)."""
    found: list[Element] = []
    begun: RawElement | None = None
    ends_first = sorted(raw.elements, key=lambda each: (each.key, not each.flags & rulesets.ELEMENT_END))
    for each in ends_first:
        if each.flags & rulesets.ELEMENT_CATCHALL:
            found.append(_element(each, bytes(raw.key_length), b"\xff" * raw.key_length))
            continue
        if begun is not None:
            last = int.from_bytes(each.key, "big") - 1
            found.append(_element(begun, begun.key, last.to_bytes(len(each.key), "big")))
        begun = None if each.flags & rulesets.ELEMENT_END else each
    if begun is not None:
        found.append(_element(begun, begun.key, b"\xff" * len(begun.key)))
    return found


def _element(raw: RawElement, low: bytes, high: bytes) -> Element:
    value = None if raw.value is None else int.from_bytes(raw.value, "big")
    return Element(low, high, value, None if raw.verdict is None else _verdict(raw.verdict))


def _verdict(packed: bytes) -> RuleVerdict | None:
    parts = attributes.parse(packed)
    kind = _VERDICTS.get(int.from_bytes(parts.get(1, b""), "big", signed=True))
    return RuleVerdict(kind, attributes.string(parts.get(2, b""))) if kind else None  # type: ignore[arg-type]


# -- rules ---------------------------------------------------------------------------------------------------------


class _Lengths(dict[str, tuple[int, int]]):
    """The lengths of keys and data of a table's sets. Tables with the same sets have the same object."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


@functools.lru_cache(maxsize=256)
def _lengths(sets: tuple[tuple[str, int, int], ...]) -> _Lengths:
    """Return the lengths of sets; `sets` are (name, lengths of keys and data)."""
    return _Lengths({name: (key, data) for name, key, data in sets})


def _rule(raw: RawRule, family: str, sets: _Lengths) -> InstalledRule:
    return InstalledRule(raw.handle, _steps(raw.packed, family, sets))


@functools.lru_cache(maxsize=4096)
def _steps(packed: bytes, family: str, sets: _Lengths) -> RuleSteps:
    """Return the steps of a rule; those of tenants are mostly the same."""
    reader = _RuleReader(family, sets)
    for expression in rulesets.expressions(packed):
        reader.read(expression)
    return RuleSteps(reader.steps)


class _RuleReader:
    """The registers while the expressions of one rule are read, in slots of 4 bytes."""

    def __init__(self, family: str, sets: Mapping[str, tuple[int, int]]) -> None:
        self.steps: list[RuleStep] = []
        self._family = family
        self._sets = sets  # (length of keys, length of data)
        self._slots: dict[int, tuple[Term, int]] = {}  # term, and how many bytes of it are in earlier slots

    def read(self, expression: RawExpression) -> None:
        name = expression.name
        if name in _IGNORED:
            return
        if name in _SOMETIMES:
            self.steps.append(Sometimes(name))
        elif name == "reject":
            self.steps.append(RuleVerdict("drop"))
        elif reader := getattr(self, f"_{name}", None):
            reader(expression)
        else:
            self.steps.append(Unknown(f"expression {name}"))

    # -- registers -------------------------------------------------------------------------------------------------

    def _set(self, register: int, term: Term) -> None:
        first = _slot(register)
        for number in range(-(-term.length // 4)):
            self._slots[first + number] = (term, 4 * number)

    def _get(self, register: int, length: int) -> Term:
        """Return the first `length` bytes of a register."""
        term, at = self._slots.get(_slot(register), (Strange("a register", length), 0))
        if at == 0 and term.length == length:
            return term
        if at + length <= term.length:
            return Slice(term, at, length)
        return Strange("a register", length)

    def _whole(self, register: int) -> Term:
        term, at = self._slots.get(_slot(register), (Strange("a register", 4), 0))
        return term if at == 0 else Slice(term, at, term.length - at)

    def _key(self, register: int, length: int) -> tuple[Term, ...]:
        """Return the terms that make a key of this length."""
        found: list[Term] = []
        slot = _slot(register)
        while length > 0:
            term, at = self._slots.get(slot, (Strange("a register", min(length, 4)), 0))
            if at:
                term = Strange("a register", min(length, 4))
            if term.length > length:
                term = Slice(term, 0, length)
            found.append(term)
            slot += -(-term.length // 4)
            length -= -(-term.length // 4) * 4
        return tuple(found)

    # -- loads -----------------------------------------------------------------------------------------------------

    def _payload(self, expression: RawExpression) -> None:
        if 5 in expression.attributes:
            self.steps.append(Unknown("a change of the packet"))
            return
        base, offset, length = (expression.number(each) for each in (2, 3, 4))
        term: Term = Load(_BASES[base], offset, length) if base in _BASES else Strange("inner header", length)
        self._set(expression.number(1), term)

    def _meta(self, expression: RawExpression) -> None:
        name, length = _META.get(expression.number(2), ("", 4))
        if 3 in expression.attributes:
            if name in ("mark", "priority"):
                self.steps.append(Assign(name, self._get(expression.number(3), length)))
            elif name:
                self.steps.append(Unknown(f"meta {name} set"))
            return
        self._set(expression.number(1), Attribute(name, length) if name else Strange("meta", 4))

    def _ct(self, expression: RawExpression) -> None:
        key = expression.number(2)
        if 4 in expression.attributes:
            if key in _CT:
                name, length = _CT[key]
                self.steps.append(Assign(name, self._get(expression.number(4), length)))
            else:
                self.steps.append(Unknown("ct set"))
            return
        self._set(expression.number(1), self._connection(key, expression))

    def _connection(self, key: int, expression: RawExpression) -> Term:
        if key in _CT:
            return Attribute(*_CT[key])
        part = _CT_TUPLE.get(key) or _CT_TUPLE6.get(key)
        if part is None or 3 not in expression.attributes:
            return Strange("ct", 4)
        direction = "reply" if expression.attributes[3][-1] else "original"
        six = key in (21, 22) or (key in (8, 9) and self._family == "ip6")
        length = 2 if part.startswith("proto") else 16 if six else 4
        return Attribute(f"ct {direction} {part}", length)

    def _fib(self, expression: RawExpression) -> None:
        result, flags = expression.number(2), expression.number(3)
        if result == 3 and not flags & 28:
            self._set(expression.number(1), AddressType(bool(flags & 1)))
            return
        if result != 1 or flags & 4:
            self._set(expression.number(1), Strange("fib", 4 if result != 2 else 16))
            return
        present = bool(flags & 32)
        term = RouteDevice(bool(flags & 1), bool(flags & 8), present, 1 if present else 4)
        self._set(expression.number(1), term)

    def _exthdr(self, expression: RawExpression) -> None:
        self._set(expression.number(1), Strange("extension header", max(1, expression.number(4, 1))))

    def _rt(self, expression: RawExpression) -> None:
        self._set(expression.number(1), Strange("rt", {1: 4, 2: 16}.get(expression.number(2), 4)))

    def _hash(self, expression: RawExpression) -> None:
        register = expression.number(2 if 2 in expression.attributes else 1)
        self._set(register, _choice(expression.number(4), expression.number(6, 0)))

    def _numgen(self, expression: RawExpression) -> None:
        self._set(expression.number(1), _choice(expression.number(2), expression.number(4, 0)))

    def _socket(self, expression: RawExpression) -> None:
        self._set(expression.number(2), Strange("socket", 4))

    def _immediate(self, expression: RawExpression) -> None:
        data = attributes.parse(expression.attributes.get(2, b""))
        if 2 in data:
            verdict = _verdict(data[2])
            if verdict is None:
                self.steps += [Unknown("a verdict"), RuleVerdict("accept")]
            elif verdict.kind != "continue":
                self.steps.append(verdict)
            return
        value = data.get(1, b"")
        self._set(expression.number(1), Constant(len(value), int.from_bytes(value, "big")))

    # -- changes of registers --------------------------------------------------------------------------------------

    def _bitwise(self, expression: RawExpression) -> None:
        length = expression.number(3)
        of = self._get(expression.number(1), length)
        if expression.number(6) != 0 or 4 not in expression.attributes or 5 not in expression.attributes:
            self._set(expression.number(2), Strange("shifted", length))
            return
        mask, xor = (attributes.parse(expression.attributes[each]).get(1, b"") for each in (4, 5))
        self._set(expression.number(2), Masked(of, int.from_bytes(mask, "big"), int.from_bytes(xor, "big")))

    def _byteorder(self, expression: RawExpression) -> None:
        length, size = expression.number(4), expression.number(5)
        self._set(expression.number(2), _swapped(self._get(expression.number(1), length), size))

    # -- conditions ------------------------------------------------------------------------------------------------

    def _cmp(self, expression: RawExpression) -> None:
        data = attributes.parse(expression.attributes.get(3, b"")).get(1, b"")
        term, value = self._get(expression.number(1), len(data)), int.from_bytes(data, "big")
        operation, most = expression.number(2), (1 << 8 * len(data)) - 1
        if operation in (0, 1):
            self.steps.append(Comparison(term, NumberRange(value, value), operation == 1))
        elif operation in (2, 3):
            self.steps.append(_compared(term, 0, value - (operation == 2)))
        elif operation in (4, 5):
            self.steps.append(_compared(term, value + (operation == 4), most))
        else:
            self.steps.append(Unknown("a comparison"))

    def _range(self, expression: RawExpression) -> None:
        low, high = (attributes.parse(expression.attributes.get(each, b"")).get(1, b"") for each in (3, 4))
        term = self._get(expression.number(1), len(low))
        range_ = NumberRange(int.from_bytes(low, "big"), int.from_bytes(high, "big"))
        self.steps.append(Comparison(term, range_, expression.number(2) == 1))

    def _lookup(self, expression: RawExpression) -> None:
        name = attributes.string(expression.attributes.get(1, b""))
        key, data = self._sets.get(name, (0, 0))
        terms = self._key(expression.number(2), key)
        negated = bool(expression.number(5) & 1)
        if 3 not in expression.attributes:
            self.steps.append(Lookup(terms, name, negated))
        elif expression.number(3) == 0:
            self.steps.append(Lookup(terms, name, verdict=True))
        else:
            number = len(self.steps)
            self.steps.append(Lookup(terms, name, number=number))
            self._set(expression.number(3), LookupResult(number, data))

    # -- translation -----------------------------------------------------------------------------------------------

    def _nat(self, expression: RawExpression) -> None:
        if 4 in expression.attributes and expression.number(4) != expression.number(3):
            self.steps.append(Unknown("a range of addresses"))  # one of them is taken; it is not known which
        length = _ADDRESS.get(expression.number(2), 4)
        address = self._get(expression.number(3), length) if 3 in expression.attributes else None
        port = self._get(expression.number(5), 2) if 5 in expression.attributes else None
        if 6 in expression.attributes and expression.number(6) != expression.number(5):
            port = Strange("a range of ports", 2)
        self.steps.append(Translate(expression.number(1) == 0, address, port))

    def _masq(self, expression: RawExpression) -> None:
        self.steps.append(Translate(True, None, None, own=True))

    def _redir(self, expression: RawExpression) -> None:
        port = self._get(expression.number(1), 2) if 1 in expression.attributes else None
        self.steps.append(Translate(False, None, port, own=True))


def _slot(register: int) -> int:
    """Return the first slot of a register: four of 16 bytes, or those of 4 bytes (NFT_REG32_00 = 8)."""
    return (register - 1) * 4 if register < 8 else register - 8


def _choice(modulus: int, offset: int) -> Term:
    """Return a number below `modulus`, from `offset` up; many are not told apart."""
    return Choice(offset, offset + modulus - 1) if 0 < modulus <= _MOST_CHOICES else Strange("a choice", 4)


def _swapped(term: Term, size: int) -> Term:
    return term if size < 2 else Swapped(term, size)


def _compared(term: Term, low: int, high: int) -> RuleStep:
    return Comparison(term, NumberRange(low, high)) if low <= high else Comparison(term, NumberRange(0, 0), True)


def device_name(name: str) -> int:
    """Return the value that a device's name has in rules."""
    return int.from_bytes(name.encode().ljust(16, b"\0"), "big")
