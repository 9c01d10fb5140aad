"""The three-way merge: the table of the module's docstring, and what holds for any forms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.declared.merge import MISSING, changes, merge, restrict, without_defaults

DEFAULT: dict[str, Any] = {"spec": {"pids": 100, "cpus": None, "env": {}}}


def form(**spec: Any) -> dict[str, Any]:
    return {"spec": spec}


def full(**spec: Any) -> dict[str, Any]:
    return form(**{"pids": 100, "cpus": None, "env": {}, **spec})


@pytest.mark.parametrize(
    ("declared", "applied", "current", "result", "in_conflict"),
    [
        # declared, and so already
        (form(pids=5), form(pids=5), full(pids=5), full(pids=5), []),
        (form(pids=5), form(), full(pids=5), full(pids=5), []),
        (form(pids=5), None, full(pids=5), full(pids=5), []),
        # declared anew
        (form(pids=6), form(pids=5), full(pids=5), full(pids=6), []),
        (form(pids=6), form(), full(), full(pids=6), []),
        # changed by hand
        (form(pids=6), form(pids=5), full(pids=7), full(pids=6), ["spec.pids"]),
        (form(pids=5), form(pids=5), full(pids=7), full(pids=5), ["spec.pids"]),
        (form(pids=6), form(), full(pids=7), full(pids=6), ["spec.pids"]),
        # not declared any more
        (form(), form(pids=5), full(pids=5), full(), []),
        (form(), form(pids=5), full(pids=7), full(pids=7), []),
        # never declared
        (form(), form(), full(pids=7), full(pids=7), []),
        (form(), None, full(pids=7), full(pids=7), []),
        # made by somebody else
        (form(pids=6), None, full(), full(pids=6), ["spec.pids"]),
        # mappings, by key
        (form(env={"A": "1"}), form(), full(env={"B": "2"}), full(env={"B": "2", "A": "1"}), []),
        (form(env={}), form(env={"A": "1"}), full(env={"A": "1", "B": "2"}), full(env={"B": "2"}), []),
        (form(), form(env={"A": "1"}), full(env={"A": "1", "B": "2"}), full(env={"B": "2"}), []),
        (form(env={"A": "1"}), form(env={"A": "1"}), full(env={"A": "9"}), full(env={"A": "1"}), ["spec.env.A"]),
        (form(env={"A": "1"}), form(env={"A": "1"}), full(), full(env={"A": "1"}), ["spec.env.A"]),
        # lists are one field
        (form(cpus=[1, 2]), form(cpus=[1]), full(cpus=[1]), full(cpus=[1, 2]), []),
        # nothing in place of a mapping, and a mapping in place of nothing
        (form(cpus=None), form(cpus={"a": 1}), full(cpus={"a": 1}), full(cpus=None), []),
        (form(cpus=None), form(cpus={"a": 1}), full(cpus={"a": 2}), full(cpus=None), ["spec.cpus"]),
        (form(cpus={"a": 1}), form(), full(), full(cpus={"a": 1}), []),
    ],
)
def test_the_table(
    declared: dict[str, Any],
    applied: dict[str, Any] | None,
    current: dict[str, Any],
    result: dict[str, Any],
    in_conflict: list[str],
) -> None:
    merged = merge(declared, applied, current, DEFAULT)
    assert merged.form == result
    assert [".".join(each.path) for each in merged.conflicts] == in_conflict


LEAF = st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.text("ab", max_size=2), st.lists(st.integers(0, 2)))
FORM = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), LEAF, max_size=4),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), st.one_of(LEAF, inner), max_size=4),
    max_leaves=12,
)


@given(FORM, FORM, FORM, FORM)
def test_what_is_declared_is_there_afterwards(
    declared: dict[str, Any], applied: dict[str, Any], current: dict[str, Any], default: dict[str, Any]
) -> None:
    merged = merge(declared, applied, current, default)
    assert contains(merged.form, declared)


@given(FORM, FORM, FORM, FORM)
def test_to_apply_twice_changes_nothing(
    declared: dict[str, Any], applied: dict[str, Any], current: dict[str, Any], default: dict[str, Any]
) -> None:
    once = merge(declared, applied, current, default).form
    again = merge(declared, declared, once, default)
    assert again.form == once and again.conflicts == [] and [*changes(once, again.form)] == []


@given(FORM, FORM, FORM)
def test_what_the_set_has_made_has_no_conflicts(
    declared: dict[str, Any], applied: dict[str, Any], default: dict[str, Any]
) -> None:
    """An object that nobody else has touched since."""
    current = merge(applied, {}, default, default).form
    assert merge(declared, applied, current, default).conflicts == []


@given(FORM, FORM)
def test_another_s_object_is_never_changed_without_a_conflict(
    current: dict[str, Any], declared: dict[str, Any]
) -> None:
    merged = merge(declared, None, current, {})
    if merged.form != current:
        assert merged.conflicts


@given(FORM, FORM)
def test_a_form_without_defaults_has_all_that_differs(full_: dict[str, Any], default: dict[str, Any]) -> None:
    sparse = without_defaults(full_, default)
    assert restrict(full_, sparse) == sparse
    assert [*changes(default, default)] == [] and bool([*changes(full_, default)]) == (full_ != default)


def contains(form_: Any, part: Any) -> bool:
    if isinstance(part, dict) and isinstance(form_, dict):
        return all(contains(form_.get(key, MISSING), value) for key, value in part.items())
    return bool(form_ == part)


def test_only_what_differs_is_told() -> None:
    now = {"a": 1, "b": {"c": 1, "d": 2}, "e": {}, "f": [1]}
    default = {"a": 1, "b": {"c": 1, "d": 3}, "f": [1], "g": 0}
    assert without_defaults(now, default) == {"b": {"d": 2}, "e": {}}
    assert [*changes(default, now)] == [("b", "d"), ("g",), ("e",)]
    assert restrict({"a": None, "b": {"c": 1}}, {"a": {"x": 1}, "b": None}) == {"a": None, "b": {"c": 1}}
    assert restrict(now, {"b": {"d": 0, "x": 0}, "f": None, "z": 0}) == {"b": {"d": 2}, "f": [1]}
