"""Device rules for version 1 and compiled for version 2, against a plain interpretation."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.kernel.cgroups import device_list, devices
from insula.kernel.cgroups.device_program import compile_rules
from tests import ebpf_machine

NUMBERS = (0, 1, 3, 7)
Rules = Sequence[dict[str, Any]]

numbers = st.sampled_from([None, -1, *NUMBERS[:3]])
rule = st.fixed_dictionaries(
    {"allow": st.booleans()},
    optional={
        "type": st.sampled_from("abc"),
        "major": numbers,
        "minor": numbers,
        "access": st.sets(st.sampled_from("rwm"), min_size=1).map("".join),
    },
)
every_rule = {"allow": True, "access": "rwm"}
rules = st.lists(rule | st.sampled_from([every_rule, {"allow": False}]), max_size=7)
device = st.tuples(st.sampled_from("bc"), st.sampled_from(NUMBERS), st.sampled_from(NUMBERS))
access = st.sets(st.sampled_from("rwm"), min_size=1)


def wanted(given_rules: Rules, device: tuple[str, int, int], access: set[str]) -> bool:
    """The last rule that speaks of a device and an access decides; none: denied."""

    def speaks(rule: dict[str, Any], letter: str) -> bool:
        kind, major, minor = device
        return (
            rule.get("type", "a") in ("a", kind)
            and rule.get("major") in (None, -1, major)
            and rule.get("minor") in (None, -1, minor)
            and letter in rule.get("access", "rwm")
        )

    def allowed(letter: str) -> bool:
        return next((r["allow"] for r in reversed(given_rules) if speaks(r, letter)), False)

    return all(map(allowed, access))


def program_says(program: bytes, device: tuple[str, int, int], access: set[str]) -> bool:
    kind, major, minor = device
    bits = sum({"m": 1, "r": 2, "w": 4}[letter] for letter in access)
    data = struct.pack("<III", bits << 16 | {"b": 1, "c": 2}[kind], major, minor)
    return bool(ebpf_machine.run(program, data))


def version_1_says(exempt: device_list.DeviceList, device: tuple[str, int, int], access: set[str]) -> bool:
    """The kernel's decision: in a deny-all group one exception must cover all, in an allow-all one none any."""
    named = [
        theirs
        for (kind, major, minor), theirs in exempt.exceptions.items()
        if kind == device[0] and major in (-1, device[1]) and minor in (-1, device[2])
    ]
    return not any(theirs & access for theirs in named) if exempt.allowed else any(access <= theirs for theirs in named)


@given(rules, device, access)
def test_the_program_decides_as_the_rules_say(rules: Rules, device: tuple[str, int, int], access: set[str]) -> None:
    assert program_says(compile_rules(rules), device, access) == wanted(rules, device, access)


@given(rules, device, access)
def test_version_1_decides_the_same_or_refuses(rules: Rules, device: tuple[str, int, int], access: set[str]) -> None:
    try:
        exempt = device_list.normalise(rules)
    except OSError as error:
        assert "linux.resources.devices" in str(error) and "cannot exclude" in str(error)
        return
    assert version_1_says(exempt, device, access) == wanted(rules, device, access)


@st.composite
def widening_rules(draw: st.DrawFn) -> Rules:
    """Rules about a device, a major number, a type: none takes back a part only of what an earlier one said."""
    found: list[dict[str, Any]] = []
    for names in (("major", "minor"), ("major",), ()):
        fields = {"allow": st.booleans(), "type": st.sampled_from("bc"), "access": access.map("".join)}
        fields |= {name: st.sampled_from(NUMBERS[:3]) for name in names}
        found += draw(st.lists(st.fixed_dictionaries(fields), max_size=5))
    return found


def agreeing_rules(allow: bool) -> st.SearchStrategy[Rules]:
    """After a rule about all, rules that all say the opposite: none takes back anything."""
    others = st.lists(rule.map(lambda r: {**r, "type": "c", "allow": allow}), max_size=5)
    return others.map(lambda rules: [{"allow": not allow}, *rules])


@given(widening_rules() | agreeing_rules(True) | agreeing_rules(False), device, access)
def test_version_1_expresses_all_rules_that_it_can(
    rules: Rules, device: tuple[str, int, int], access: set[str]
) -> None:
    assert version_1_says(device_list.normalise(rules), device, access) == wanted(rules, device, access)


def test_version_1_allows_what_two_rules_allow_together() -> None:
    """The kernel takes one exception for a device: so there is one for what both are about."""
    both = {"allow": True, "type": "c"}
    rules = [{**both, "major": 1, "access": "r"}, {**both, "minor": 3, "access": "w"}]
    exempt = device_list.normalise(rules)
    assert exempt.exceptions["c", 1, 3] == {"r", "w"}
    assert version_1_says(exempt, ("c", 1, 3), {"r", "w"})
    assert not version_1_says(exempt, ("c", 1, 4), {"r", "w"})
    assert not version_1_says(exempt, ("b", 1, 3), {"r"})


@pytest.mark.parametrize("hole", [{"major": 1, "minor": 3}, {"minor": 3}])
def test_version_1_refuses_an_exception_from_an_allowed_range(hole: dict[str, int]) -> None:
    allow = {"allow": True, "type": "c", "major": 1}
    with pytest.raises(OSError, match=r"cannot exclude c (1|\*):3 r from c 1:\* rwm"):
        device_list.normalise([allow, {"allow": False, "type": "c", "access": "r", **hole}])
    device_list.normalise([allow, {"allow": False, "type": "b", "access": "r", **hole}])  # of which nothing was allowed
    device_list.normalise([allow, {"allow": False, "type": "c", "access": "r", "major": 2, "minor": 3}])


class List:
    """A version 1 group's list, changed as the kernel changes it (devcgroup_update_access)."""

    def __init__(self, text: str) -> None:
        self.allows_all = text == "a *:* rwm"
        self.entries = {} if self.allows_all else {d: set(a) for d, a in map(device_list._parse, text.splitlines())}

    def write(self, file: str, line: str) -> None:
        if line == "a":
            self.allows_all, self.entries = file == "devices.allow", {}
            return
        device, access = device_list._parse(line)
        if (file == "devices.allow") != self.allows_all:
            self.entries.setdefault(device, set()).update(access)
        elif device in self.entries:
            self.entries[device] -= access

    @property
    def exempt(self) -> device_list.DeviceList:
        left = {device: frozenset(access) for device, access in self.entries.items() if access}
        return device_list.DeviceList(self.allows_all, left)


@given(rules, rules)
def test_a_list_becomes_another(before: Rules, after: Rules) -> None:
    try:
        old, new = device_list.normalise(before), device_list.normalise(after)
    except OSError:
        return
    group = List(old.listed)
    for file, line in device_list.changes(old.listed, new):
        group.write(file, line)
    assert (group.allows_all, group.exempt.exceptions) == (new.allowed, new.exceptions)
    if not new.allowed:
        assert device_list.changes(group.exempt.listed, new) == [], "the second time there is nothing to do"


def test_a_list_in_use_is_never_reset() -> None:
    """A group with groups below it refuses that, and for a moment everything would be denied."""
    old = device_list.normalise([{"allow": True, "type": "c", "major": 1, "minor": 3}, {"allow": True, "type": "b"}])
    new = device_list.normalise([{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"}])
    assert device_list.changes(old.listed, new) == [
        ("devices.deny", "c 1:3 wm"),
        ("devices.deny", "b *:* rwm"),
    ]


@pytest.mark.parametrize(
    "rule",
    [
        {"allow": True, "type": "x"},
        {"allow": True, "type": "p", "major": 1},
        {"allow": True, "access": "rwx"},
        {"allow": True, "type": "c", "major": 1 << 31},
        {"allow": True, "type": "c", "major": 1, "minor": 1 << 20},
    ],
)
def test_invalid_rules_are_refused_by_both_versions(rule: dict[str, Any]) -> None:
    for version in (device_list.normalise, compile_rules):
        with pytest.raises(OSError, match=r"linux\.resources\.devices"):
            version([rule])


def test_the_largest_number_of_a_device_is_one() -> None:
    rule = {"allow": True, "type": "c", "major": 1, "minor": (1 << 20) - 1, "access": "r"}
    assert device_list.normalise([rule]).listed == "c 1:1048575 r"


@pytest.mark.parametrize(
    ("major", "minors"), [(1, {3, 5, 7, 8, 9}), (5, {0, 1, 2}), (136, {0, 1, 77}), (0, set()), (2, set()), (137, set())]
)
def test_the_defaults_are_these_devices(major: int, minors: set[int]) -> None:
    """null, zero, full, random, urandom; tty, console, ptmx; pseudoterminals: as config-linux.md lists them."""
    program = compile_rules([{"allow": False}, *devices.DEFAULT])
    for minor in {*range(12), 77}:
        for letter in "rw":
            assert program_says(program, ("c", major, minor), {letter}) == (minor in minors or major == 136)


def test_the_defaults_are_what_every_container_needs() -> None:
    program = compile_rules([{"allow": False}, *devices.DEFAULT])
    assert program_says(program, ("c", 1, 3), {"r", "w"})
    assert program_says(program, ("c", 136, 77), {"r", "w"})
    assert program_says(program, ("b", 8, 0), {"m"})
    assert program_says(program, ("c", 8, 0), {"m"})
    assert not program_says(program, ("b", 8, 0), {"r"})
    assert not program_says(program, ("c", 1, 1), {"r"})  # /dev/mem
