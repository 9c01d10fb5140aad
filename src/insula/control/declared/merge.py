"""The three-way merge of an object's declared, last applied and current fields.

A *form* is the object as nested dicts. That of the file has only what is declared there; the current one has all
fields. Dicts are merged by key; everything else, also a list, is one field:

| the field is | and | then |
|---|---|---|
| declared | has that value | nothing |
| declared | is as it was applied last, or has its default and was not applied | it is changed |
| declared | differs from both | a conflict: somebody has changed it by hand |
| not declared, but applied last | is as it was applied last | it gets its default |
| not declared, but applied last | was changed by hand | it stays: the file has given it up |
| neither | | it stays |

An object that the set has not made is somebody else's: every difference is a conflict.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Form = dict[str, Any]
FieldPath = tuple[str, ...]


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING: Any = _Missing()


class Difference(NamedTuple):
    """A field that was changed by hand."""

    path: FieldPath
    applied: Any
    current: Any
    declared: Any


class Merged(NamedTuple):
    """The form that the object is to have, with the declared value of each field in conflict."""

    form: Form
    conflicts: list[Difference]


def merge(declared: Form, applied: Form | None, current: Form, default: Form) -> Merged:
    """Merge. `applied` is None for an object that the set has not made."""
    conflicts: list[Difference] = []

    def field(path: FieldPath, given: Any, last: Any, now: Any, normal: Any) -> Any:
        below = isinstance(given, dict) or (given is MISSING and isinstance(last, dict))
        if isinstance(now, dict) and below:
            parts = [each if isinstance(each, dict) else {} for each in (given, last, now, normal)]
            keys = dict.fromkeys((*now, *parts[0]))
            values = {key: field((*path, key), *(part.get(key, MISSING) for part in parts)) for key in keys}
            return {key: value for key, value in values.items() if value is not MISSING}
        if given is MISSING:
            return now if last is MISSING or last != now else normal
        if given == now:
            return now
        untouched = now == normal if last is MISSING else _is_as_applied(last, now, normal)
        if applied is None or not untouched:
            conflicts.append(Difference(path, last, now, given))
        return given

    return Merged(field((), declared, applied or {}, current, default), conflicts)


def _is_as_applied(last: Any, now: Any, normal: Any) -> bool:
    """Whether a value is what was applied, which may have only some of its fields: the others have their defaults."""
    if not (isinstance(last, dict) and isinstance(now, dict)):
        return bool(last == now)
    if not last.keys() <= now.keys():
        return False
    defaults = normal if isinstance(normal, dict) else {}
    rest = {key: value for key, value in now.items() if key not in last and key in defaults}
    return all(_is_as_applied(value, now[key], defaults.get(key)) for key, value in last.items()) and all(
        value == defaults[key] for key, value in rest.items()
    )


def restrict(full: Form, given: Form) -> Form:
    """Return of `full` the fields that are in `given`."""
    return {
        key: restrict(full[key], value) if isinstance(value, dict) and isinstance(full[key], dict) else full[key]
        for key, value in given.items()
        if key in full
    }


def without_defaults(full: Form, default: Form) -> Form:
    """Return of `full` the fields that differ from `default`."""
    found = {}
    for key, value in full.items():
        normal = default.get(key, MISSING)
        if value == normal:
            continue
        both = isinstance(value, dict) and isinstance(normal, dict)
        found[key] = without_defaults(value, normal) if both else value
    return found


def changes(before: Form, after: Form, path: FieldPath = ()) -> Iterator[FieldPath]:
    """Yield the paths of the fields that differ."""
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key, MISSING), after.get(key, MISSING)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(old, new, (*path, key))
        elif old != new:
            yield (*path, key)
