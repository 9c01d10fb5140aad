"""The interpreter's algebra: on random rules it says the same as a simulator that looks at one packet at a time."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from insula.network.interpreter.alike import representatives
from insula.network.interpreter.boundaries import collect
from insula.network.interpreter.fields import HeaderFields, State, initial, new_connection
from insula.network.interpreter.machine import Machine
from insula.network.interpreter.program import (
    Assign,
    Attribute,
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
    RuleStep,
    RuleVerdict,
    Slice,
    Sometimes,
    Swapped,
    Term,
    Unknown,
)
from insula.network.interpreter.space import TCP, UDP, Boundaries, Cuts, NumberRange, Service, Space
from insula.network.interpreter.values import Hit, Symbolic

NETWORK = Path(__file__).parents[2] / "src/insula/network"

# -- random rules --------------------------------------------------------------------------------------------------

SADDR, DADDR = Load("network", 12, 4), Load("network", 16, 4)
SPORT, DPORT = Load("transport", 0, 2), Load("transport", 2, 2)
MARK, PROTOCOL, IIF = Attribute("mark", 4), Attribute("l4proto", 1), Attribute("iifname", 16)
DEVICES = (int.from_bytes(b"br1".ljust(16, b"\0"), "big"), int.from_bytes(b"br2".ljust(16, b"\0"), "big"))
PREFIX = Slice(IIF, 0, 2)
MARKS: list[Term] = [MARK, Swapped(MARK, 4)]

addresses = st.integers(0x0A000000, 0x0A00000F)
ports = st.integers(20, 30)


@st.composite
def comparisons(draw: st.DrawFn) -> RuleStep:
    kind = draw(st.integers(0, 6))
    negated = draw(st.booleans())
    if kind == 0:
        low = draw(addresses)
        return Comparison(draw(st.sampled_from([SADDR, DADDR])), NumberRange(low, low), negated)
    if kind == 1:
        low = draw(addresses)
        return Comparison(
            draw(st.sampled_from([SADDR, DADDR])), NumberRange(low, draw(st.integers(low, low + 9))), negated
        )
    if kind == 2:
        mask = 0xFFFFFFFF << draw(st.integers(0, 4)) & 0xFFFFFFFF
        value = draw(addresses) & mask
        return Comparison(Masked(draw(st.sampled_from([SADDR, DADDR])), mask, 0), NumberRange(value, value), negated)
    if kind == 3:
        low = draw(ports)
        return Comparison(
            draw(st.sampled_from([SPORT, DPORT])), NumberRange(low, draw(st.integers(low, low + 5))), negated
        )
    if kind == 4:
        protocol = draw(st.sampled_from([TCP, UDP, 50]))
        return Comparison(PROTOCOL, NumberRange(protocol, protocol), negated)
    if kind == 5:
        value = draw(st.integers(0, 3))
        return Comparison(draw(st.sampled_from(MARKS)), NumberRange(value, value), negated)
    value = int.from_bytes(b"br", "big")
    return Comparison(PREFIX, NumberRange(value, value), negated)


@st.composite
def lookups(draw: st.DrawFn) -> RuleStep:
    name = draw(st.sampled_from(["pairs", "ports", "names"]))
    terms = {"pairs": (SADDR, DADDR), "ports": (MARK, PROTOCOL, DPORT), "names": (IIF,)}[name]
    return Lookup(terms, name, draw(st.booleans()))


@st.composite
def rules(draw: st.DrawFn, chains: tuple[str, ...]) -> InstalledRule:
    steps: list[RuleStep] = draw(st.lists(st.one_of(comparisons(), lookups()), max_size=3))
    if draw(st.booleans()):
        term: Term = Constant(4, draw(st.integers(0, 3)))
        if draw(st.booleans()):
            steps.append(Lookup((draw(st.sampled_from([SADDR, DADDR])),), "marks", number=9))
            term = LookupResult(9, 4)
        steps.append(Assign("mark", term))
    kinds = ["accept", "drop", "return", "continue"] + (["jump", "goto"] if chains else [])
    kind = draw(st.sampled_from(kinds))
    if chains and draw(st.integers(0, 4)) == 0:
        steps.append(Lookup((IIF,), "verdicts", verdict=True))
    elif kind != "continue":
        chain = draw(st.sampled_from(chains)) if kind in ("jump", "goto") else ""
        steps.append(RuleVerdict(kind, chain))  # type: ignore[arg-type]
    return InstalledRule(1, tuple(steps))


def key(*parts: tuple[int, int]) -> bytes:
    return b"".join(value.to_bytes(length, "big").ljust(-(-length // 4) * 4, b"\0") for value, length in parts)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    chains = {}
    for name, others in (("c", ()), ("b", ("c",)), ("a", ("b", "c"))):
        chains[name] = InstalledChain(name, None, 0, "", True, draw(st.lists(rules(others), max_size=4)))
    for hook, name in ((2, "one"), (2, "two")):
        listed = draw(st.lists(rules(("a", "b", "c")), min_size=1, max_size=5))
        chains[name] = InstalledChain(name, hook, len(chains), "filter", draw(st.booleans()), listed)
    pairs = draw(st.lists(st.tuples(addresses, addresses, st.integers(0, 4)), max_size=5))
    triples = draw(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([TCP, UDP]), ports), max_size=5))
    marks = draw(st.dictionaries(addresses, st.integers(0, 3), max_size=5))
    kinds = [RuleVerdict("accept"), RuleVerdict("drop"), RuleVerdict("jump", "c"), RuleVerdict("goto", "c")]
    verdicts = draw(st.dictionaries(st.sampled_from(DEVICES), st.sampled_from(kinds)))

    def exact(packed: bytes, value: int | None = None, verdict: RuleVerdict | None = None) -> Element:
        return Element(packed, packed, value, verdict)

    sets = {
        "pairs": InstalledSet([Element(key((a, 4), (b, 4)), key((a, 4), (b + more, 4))) for a, b, more in pairs]),
        "ports": InstalledSet([exact(key((m, 4), (p, 1), (d, 2))) for m, p, d in triples]),
        "names": InstalledSet([exact(key((each, 16))) for each in DEVICES[: draw(st.integers(0, 2))]]),
        "marks": InstalledSet([exact(key((a, 4)), mark) for a, mark in marks.items()], 4),
        "verdicts": InstalledSet([exact(key((each, 16)), None, v) for each, v in verdicts.items()]),
    }
    return Program([InstalledTable("inet", "t", chains, sets)])


# -- one packet at a time ------------------------------------------------------------------------------------------


@dataclass
class Simulator:
    """nf_tables_core.c, for one packet."""

    program: Program
    packet: dict[str, int]
    found: dict[int, int] = field(default_factory=dict)

    def passes(self) -> bool:
        for table, chain in self.program.hooked(("inet",), 2):
            if (self._chain(table, chain) or ("accept" if chain.accepts else "drop")) == "drop":
                return False
        return True

    def _chain(self, table: InstalledTable, chain: InstalledChain) -> str:
        """accept, drop, or "" at the end."""
        for rule in chain.rules:
            verdict = self._rule(table, rule)
            if verdict is None:
                continue
            if verdict.kind in ("accept", "drop"):
                return verdict.kind
            if verdict.kind == "return":
                return ""
            if verdict.kind == "goto":
                return self._chain(table, table.chains[verdict.chain])
            if verdict.kind == "jump" and (said := self._chain(table, table.chains[verdict.chain])):
                return said
        return ""

    def _rule(self, table: InstalledTable, rule: InstalledRule) -> RuleVerdict | None:
        for step in rule.steps:
            if isinstance(step, RuleVerdict):
                return step
            if isinstance(step, Assign):
                value = self._value(step.term)
                assert value is not None
                self.packet[step.field] = value
            elif isinstance(step, Comparison):
                value = self._value(step.term)
                if value is None or (step.range.low <= value <= step.range.high) == step.negated:
                    return None
            else:
                assert isinstance(step, Lookup)
                values = [self._value(term) for term in step.terms]
                if None in values:
                    return None
                entries = table.sets[step.set].entries(tuple(term.length for term in step.terms))
                hits = [e for e in entries if all(k.low <= v <= k.high for k, v in zip(e.keys, values, strict=True))]  # type: ignore[operator]
                if bool(hits) == step.negated:
                    return None
                if step.verdict:
                    return hits[-1].verdict
                if step.number is not None:
                    self.found[step.number] = hits[-1].value or 0
        return None

    def _value(self, term: Term) -> int | None:
        match term:
            case Constant(value=value):
                return value
            case LookupResult(number=number):
                return self.found[number]
            case Masked(of=of, mask=mask, xor=xor):
                inner = self._value(of)
                return None if inner is None else inner & mask ^ xor
            case Swapped(of=of):
                inner = self._value(of)
                return None if inner is None else int.from_bytes(inner.to_bytes(of.length, "little"), "big")
            case Slice(of=of, start=start, length=length):
                inner = self._value(of)
                return None if inner is None else inner >> 8 * (of.length - start - length) & (1 << 8 * length) - 1
            case Attribute(name=name):
                return self.packet[name]
            case Load():
                return self.packet.get({SADDR: "saddr", DADDR: "daddr", SPORT: "sport", DPORT: "dport"}[term])
        raise AssertionError(term)


def classes(program: Program) -> tuple[Space, State, list[tuple[int, NumberRange]]]:
    boundaries = Boundaries(4)
    for address in (0x0A000003, 0x0A000007):
        boundaries.addresses.add(address, address)
    collect(program, boundaries)
    targets = boundaries.addresses.atoms()
    senders = [(device, source) for device in DEVICES for source in targets if 0x09FFFFFF < source.low < 0x0A000010]
    space = Space(len(senders), targets, boundaries.services())
    state = initial(space, 4)
    state["saddr"] = space.by_source(4, [source for _, source in senders])
    state["daddr"] = space.by_target(4)
    state["iifname"] = space.by_source(16, [NumberRange(device, device) for device, _ in senders])
    new_connection(state, space)
    return space, state, senders


def packet(device: int, source: int, target: int, service: Service, high: bool) -> dict[str, int]:
    """One packet of a class: the first, or the last."""

    def of(range_: NumberRange) -> int:
        return range_.high if high else range_.low

    made = {"iifname": device, "saddr": source, "daddr": target, "mark": 0, "l4proto": of(service.protocol)}
    if service.has_ports and service.source and service.target:
        made |= {"sport": of(service.source), "dport": of(service.target)}
    return made


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(programs(), st.randoms(use_true_random=False))
def test_it_agrees_with_a_simulator_of_single_packets(program: Program, random: Random) -> None:
    """A packet without ports may have anything in their place: it may pass where the simulator drops it."""
    space, state, senders = classes(program)
    machine = Machine(program, space, HeaderFields(4, space))
    passing = machine.hook(("inet",), 2, state, space.all)
    assert machine.unknown == set()
    usual = [n for n, each in enumerate(space.services) if each.has_ports or each.protocol == (50, 50)]
    for number, (device, source) in enumerate(senders):
        for target, range_ in enumerate(space.targets):
            for service in random.sample(usual, min(len(usual), 4)):
                said = bool(passing >> space.cell(number, target) >> service & 1)
                for high in (False, True):
                    ends = (source.high, range_.high) if high else (source.low, range_.low)
                    one = packet(device, *ends, space.services[service], high)
                    does = Simulator(program, dict(one)).passes()
                    assert does <= said, ("a packet passes that should not", one)
                    if space.services[service].has_ports:
                        assert does == said, one


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(programs())
def test_services_that_are_alike_fare_alike(program: Program) -> None:
    space, state, senders = classes(program)
    boundaries = Boundaries(4)
    collect(program, boundaries)
    machine = Machine(program, space, HeaderFields(4, space))
    passing = machine.hook(("inet",), 2, state, space.all)
    found = representatives(program, boundaries)
    members = [each._replace(alike=()) for one in found for each in (one, *one.alike)]
    assert sorted(members) == sorted(space.services), "each service is in one set"
    numbers = {each: number for number, each in enumerate(space.services)}
    marks = [bits for _, _, bits in state["mark"].parts]
    for bits in (passing, *marks, state["mark"].unknown, state["mark"].several):
        for number in range(len(senders)):
            for target in range(len(space.targets)):
                cell = space.services_of(bits, number, target)
                for one in found:
                    mine = cell >> numbers[one._replace(alike=())] & 1
                    assert all(cell >> numbers[each] & 1 == mine for each in one.alike), one


def test_services_that_a_model_tells_apart_are_not_alike() -> None:
    boundaries = Boundaries(4)
    boundaries.targets[TCP].add(80, 80)
    assert [len(each.alike) + 1 for each in representatives(Program(), boundaries)] == [len(boundaries.services())]
    boundaries.tells.append(lambda services: [sum(1 << n for n, s in enumerate(services) if s.target == (80, 80))])
    apart = [each for each in representatives(Program(), boundaries) if each.target == (80, 80)]
    assert [(each.protocol, each.alike) for each in apart] == [((TCP, TCP), ())]


# -- single facts --------------------------------------------------------------------------------------------------


def run(
    rules_: list[tuple[RuleStep, ...]], *, accepts: bool = False, sets: dict[str, InstalledSet] | None = None
) -> tuple[Space, int, Machine]:
    listed = [InstalledRule(1, steps) for steps in rules_]
    program = Program(
        [InstalledTable("inet", "t", {"f": InstalledChain("f", 2, 0, "filter", accepts, listed)}, sets or {})]
    )
    boundaries = Boundaries(4)
    collect(program, boundaries)
    space = Space(1, boundaries.addresses.atoms(), boundaries.services())
    state = initial(space, 4)
    state["saddr"], state["daddr"] = space.by_source(4, [NumberRange(1, 1)]), space.by_target(4)
    new_connection(state, space)
    machine = Machine(program, space, HeaderFields(4, space))
    return space, machine.hook(("inet",), 2, state, space.all), machine


ACCEPT, DROP = RuleVerdict("accept"), RuleVerdict("drop")


def test_what_is_not_known_may_pass_and_is_told() -> None:
    space, passing, machine = run([(Unknown("a riddle"), ACCEPT)])
    assert passing == space.all and machine.unknown == {"a riddle"}


def test_a_drop_that_may_not_happen_drops_nothing() -> None:
    for step in (Unknown("a riddle"), Sometimes("limit")):
        space, passing, _ = run([(step, DROP)], accepts=True)
        assert passing == space.all
    space, passing, _ = run([(DROP,)], accepts=True)
    assert passing == 0, "the positive control"


def test_a_set_that_packets_change_may_have_any_element_and_is_told_unless_its_elements_expire() -> None:
    lookup = Lookup((SADDR,), "lately")
    for expire in (True, False):
        sets = {"lately": InstalledSet((), changes=True, unsure=expire)}
        for rule, accepts in (((lookup, DROP), True), ((lookup, ACCEPT), False)):
            space, passing, machine = run([rule], accepts=accepts, sets=sets)
            assert passing == space.all
            assert machine.unknown == (set() if expire else {"set lately, which packets change"})


def test_a_fresh_connection_is_new_and_has_no_mark() -> None:
    new = Comparison(Masked(Attribute("ct state", 4), 8 << 24, 0), NumberRange(0, 0), True)
    old = Comparison(Masked(Attribute("ct state", 4), 6 << 24, 0), NumberRange(0, 0), True)
    space, passing, _ = run([(new, ACCEPT)])
    assert passing == space.all
    assert run([(old, ACCEPT)])[1] == 0
    assert run([(Comparison(Attribute("ct mark", 4), NumberRange(0, 0)), ACCEPT)])[1] == space.all


def test_atoms_have_the_borders_of_all_ranges() -> None:
    cuts = Cuts(8)
    cuts.add(10, 19)
    cuts.add(15, 255)
    assert cuts.atoms() == [(0, 9), (10, 14), (15, 19), (20, 255)]


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=6), st.data())
def test_a_range_holds_for_what_is_in_it(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    parts = [(min(pair), max(pair), 1 << number) for number, pair in enumerate(pairs)]
    value = Symbolic(1, parts, 1 << 20)
    low = data.draw(st.integers(0, 255))
    high = data.draw(st.integers(low, 255))
    must, may = value.within(low, high)
    for first, last, bit in parts:
        numbers = range(first, last + 1)
        assert bool(may & bit) == any(low <= n <= high for n in numbers)
        assert bool(must & bit) == all(low <= n <= high for n in numbers)
    assert may & 1 << 20 and not must & 1 << 20


def test_an_assignment_that_is_uncertain_makes_a_field_unknown() -> None:
    value = Symbolic(1, [(1, 1, 0b1111)]).assigned(Hit(0b0001, 0b0011), Symbolic(1, [(7, 7, 0b1111)]))
    assert value.within(7, 7) == (0b0001, 0b0011)
    assert value.within(1, 1) == (0b1100, 0b1110)


# -- independence --------------------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


COMPILER = ("rules", "state", "tenant", "policy", "overlay", "underlay", "epoch", "fabric", "readback", "neighbours")
INTERPRETER = [*NETWORK.glob("interpreter/*.py"), *NETWORK.glob("linux/interpreter/*.py")]
MODEL = [*NETWORK.glob("reference/*.py")]
assert INTERPRETER and MODEL


@pytest.mark.parametrize("path", INTERPRETER, ids=lambda path: path.name)
def test_the_interpreter_knows_neither_compiler_nor_model(path: Path) -> None:
    for name in imported(path):
        assert not name.startswith("insula.network.reference")
        assert not name.startswith(tuple(f"insula.network.linux.{each}" for each in COMPILER)), name


@pytest.mark.parametrize("path", MODEL, ids=lambda path: path.name)
def test_the_model_knows_neither_compiler_nor_interpreter(path: Path) -> None:
    data = ("space", "delivery", "links", "connections", "queues")  # what both speak of
    for name in imported(path):
        assert not name.startswith("insula.network.linux"), name
        if name.startswith("insula.network.interpreter."):
            assert name.split(".")[3] in data, name


def test_the_compiler_knows_neither_interpreter_nor_model() -> None:
    paths = [*NETWORK.glob("linux/*.py"), *NETWORK.glob("linux/peerings/*.py"), *NETWORK.glob("linux/policy/*.py")]
    for path in paths:
        if path.stem in ("fabric", "tenant"):  # they hold the interpreter's handles
            continue
        for name in imported(path):
            assert "interpreter" not in name and not name.startswith("insula.network.reference"), (path.name, name)
