"""Arbitrary seccomp profiles: each is compiled or refused in one line, in bounded time."""

from __future__ import annotations

import copy
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from insula.control.instances.drivers.container import seccomp_default
from insula.kernel import capabilities, syscall_numbers
from insula.kernel.seccomp import bpf, compiler
from insula.kernel.seccomp import cache as seccomp_cache
from insula.kernel.seccomp.load import FLAGS
from insula.model.errors import Invalid
from tests.bpf_machine import run

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [0, -1, 5, 6, 4095, 4096, 0xFFFF, 1 << 32, (1 << 64) - 1, 1 << 64, "", "write", "mount\0", "\ud800"]
    ),
    st.sampled_from([*compiler._ACTIONS, *compiler._OPERATORS, *syscall_numbers.ARCHS, *FLAGS, "SCMP_ARCH_S390X"]),
)
FIELDS = st.sampled_from(
    ["defaultAction", "defaultErrnoRet", "architectures", "flags", "listenerPath", "listenerMetadata", "syscalls",
     "names", "action", "errnoRet", "args", "index", "value", "valueTwo", "op"]
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(FIELDS, st.text(max_size=8)), inner, max_size=5)
    ),
    max_leaves=20,
)
GOOD: dict[str, Any] = {
    **seccomp_default.profile(capabilities.to_names(capabilities.DEFAULT)),
    "flags": ["SECCOMP_FILTER_FLAG_LOG"],
    "listenerPath": "/run/agent.sock",
    "listenerMetadata": "more",
}


def survives(profile: Any) -> None:
    """It is a filter that answers, or `Invalid` in one line with a hint."""
    try:
        checked = compiler.parse(profile)
        program = compiler.compile(checked)
    except Invalid as error:
        assert error.message.startswith("seccomp ")
        assert error.message.isprintable()
        assert len(error.message) < 400
        assert error.hint
        return
    assert 0 < len(program) // 8 <= bpf.MAX_INSTRUCTIONS
    rng = random.Random(1)
    for _ in range(10):
        audit = rng.choice([arch.audit for arch in checked.archs])
        run(program, audit, rng.getrandbits(9), [rng.getrandbits(64) for _ in range(6)])


@given(JSON)
@settings(max_examples=150, deadline=None)
def test_anything_at_all(value: Any) -> None:
    survives(value)


@given(st.dictionaries(FIELDS, JSON, max_size=7))
@settings(max_examples=150, deadline=None)
def test_fields_with_anything_in_them(profile: dict[str, Any]) -> None:
    survives({"defaultAction": "SCMP_ACT_ERRNO", **profile})


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_good_profile_with_one_thing_replaced(data: st.DataObject) -> None:
    profile = copy.deepcopy(GOOD)
    place: Any = profile
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 2)) == 0:
            place[key] = data.draw(JSON)
            break
        place = place[key]
    survives(profile)


@given(JSON)
@settings(max_examples=50, deadline=None)
def test_invalid_profiles_have_a_cache_key_too(value: Any) -> None:
    """The name comes first, before anybody has looked at the profile."""
    first, second = (seccomp_cache._path({"defaultAction": copy.deepcopy(value)}, "/cache") for _ in range(2))
    assert first == second
    assert len(first) == len("/cache/") + 32 + len(".bpf")


def test_deep_and_long_ones() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    survives({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": deep})
    seccomp_cache._path({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": deep}, "/cache")
    rule = {"names": [f"call{n}" for n in range(50_000)], "action": "SCMP_ACT_ALLOW"}
    survives({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule] * 2})
    survives({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{**rule, "names": ["read"]}] * 20_000})
