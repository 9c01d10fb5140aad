"""YAML 1.2 with the core schema, as data from strangers: no anchors, no tags, no duplicate keys, bounded.

The events come from libyaml by PyYAML, whose own resolver is that of YAML 1.1: there `NO` is false, and `22:22` the
number 1342. So scalars are resolved here (yaml.org/spec/1.2.2, 10.3.2). The module yaml is imported when it is needed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from insula.model.errors import Invalid
from insula.model.units import shorten

MAX_NODES = 10_000
"""Values and keys in all documents of a request."""
MAX_DEPTH = 32
ValuePath = tuple[str | int, ...]
Marks = dict[ValuePath, tuple[int, int]]
"""The line and column of each value, from 1."""
_NULL = re.compile("|~|null|Null|NULL")
_BOOL = re.compile("true|True|TRUE|false|False|FALSE")
_INT = re.compile("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_STRING_TAG = "tag:yaml.org,2002:str"


class NodeLimit:
    """Counts the nodes of a request."""

    def __init__(self, nodes: int = MAX_NODES) -> None:
        self.left = nodes

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Invalid(f"there are more than {MAX_NODES} values", "apply it in parts")


def resolve(text: str) -> Any:
    """Return the value of a plain scalar in the core schema. ValueError if a number has no finite 64-bit form."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        if len(text) > 24:
            raise ValueError
        value = int(text[2:], 8 if text[1] == "o" else 16) if text[:2] in ("0o", "0x") else int(text)
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError
        return value
    if _FLOAT.fullmatch(text):
        if text[-1] in "fFnN" or not math.isfinite(number := float(text)):
            raise ValueError
        return number
    return text


@dataclass
class _Frame:
    """A collection that is being read; `key` is that of the next value."""

    value: Any
    path: ValuePath
    key: str | None = None
    keys: set[str] = field(default_factory=set)


def read(text: str, where: str, budget: NodeLimit) -> Iterator[tuple[Any, Marks]]:
    """Yield the documents of a file that is named `where` in errors. Invalid, with line and column."""
    import yaml  # type: ignore[import-untyped, unused-ignore]

    try:
        yield from _documents(yaml, text, where, budget)
    except yaml.YAMLError as error:
        raise Invalid(f"{where}{_place(error)}: {_problem(error)}", "it is not YAML 1.2") from None


def _documents(yaml: Any, text: str, where: str, budget: NodeLimit) -> Iterator[tuple[Any, Marks]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    builder = _Builder(where, budget)
    for event in yaml.parse(text, Loader=loader):
        match type(event).__name__:
            case "DocumentStartEvent":
                builder = _Builder(where, budget)
            case "DocumentEndEvent":
                yield builder.root, builder.marks
            case "ScalarEvent" | "MappingStartEvent" | "SequenceStartEvent" | "AliasEvent":
                builder.begin(event)
            case "MappingEndEvent" | "SequenceEndEvent":
                builder.stack.pop()


class _Builder:
    """Makes the value of one document from its events."""

    def __init__(self, where: str, budget: NodeLimit) -> None:
        self.where = where
        self.budget = budget
        self.root: Any = None
        self.marks: Marks = {}
        self.stack: list[_Frame] = []

    def begin(self, event: Any) -> None:
        mark = event.start_mark
        place = f"{self.where}:{mark.line + 1}:{mark.column + 1}"
        if event.anchor is not None:
            raise Invalid(f"{place}: anchors and aliases are not allowed", "write the value out")
        kind = type(event).__name__
        if getattr(event, "tag", None) not in (None, "!", _STRING_TAG):
            raise Invalid(f"{place}: tags are not allowed", "leave it out, and quote what is to be a string")
        try:
            self.budget.take()
        except Invalid as error:
            raise Invalid(f"{place}: {error.message}", error.hint) from None
        top = self.stack[-1] if self.stack else None
        if top and isinstance(top.value, dict) and top.key is None:
            self._key(top, event, kind, place)
            return
        value = {} if kind.startswith("Mapping") else [] if kind.startswith("Sequence") else _scalar(event, place)
        path = self._put(top, value)
        self.marks[path] = mark.line + 1, mark.column + 1
        if kind != "ScalarEvent":
            if len(self.stack) >= MAX_DEPTH:
                raise Invalid(f"{place}: it is nested more than {MAX_DEPTH} levels deep", "make it simpler")
            self.stack.append(_Frame(value, path))

    def _key(self, top: _Frame, event: Any, kind: str, place: str) -> None:
        if kind != "ScalarEvent":
            raise Invalid(f"{place}: a key is a collection", "keys are strings")
        key = _scalar(event, place)
        if not isinstance(key, str):
            raise Invalid(f"{place}: the key {shorten(event.value)} is not a string", "quote it")
        if key in top.keys:
            raise Invalid(f"{place}: the key {shorten(key)} is there twice", "leave one of them out")
        top.keys.add(key)
        top.key = key

    def _put(self, top: _Frame | None, value: Any) -> ValuePath:
        """Put a value where it belongs, and return its path."""
        if top is None:
            self.root = value
            return ()
        if isinstance(top.value, list):
            top.value.append(value)
            return (*top.path, len(top.value) - 1)
        assert top.key is not None
        path = (*top.path, top.key)
        top.value[top.key], top.key = value, None
        return path


def _scalar(event: Any, place: str) -> Any:
    text: str = event.value
    if event.style or event.tag is not None:  # quoted, a block, or !!str
        return text
    try:
        return resolve(text)
    except ValueError:
        raise Invalid(f"{place}: the number {shorten(text)} is too large", "quote it if it is a string") from None


def _place(error: Any) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def _problem(error: Any) -> str:
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "it can't be read"
    return str(reason)


# -- writing ---------------------------------------------------------------------------------------------------------


def write(documents: Sequence[Any]) -> str:
    """Return documents as YAML, in ASCII, that readers of YAML 1.1 and 1.2 understand alike."""
    import yaml

    text: str = yaml.dump_all(
        documents, Dumper=_dumper(), sort_keys=False, explicit_start=len(documents) > 1, width=1 << 20
    )
    return text


@functools.cache
def _dumper() -> Any:
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc, unused-ignore]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def string(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar(_STRING_TAG, text, style='"' if _is_ambiguous(text) else None)

    Dumper.add_representer(str, string)
    return Dumper


def _is_ambiguous(text: str) -> bool:
    """Whether a plain scalar of this text is no string in the core schema."""
    try:
        return not isinstance(resolve(text), str)
    except ValueError:
        return True
