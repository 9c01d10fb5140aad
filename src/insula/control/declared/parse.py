"""Files with documents: YAML, TOML or JSON as values, with a place in the file for errors.

A file of TOML is one document, or has several as tables of the array `document`. One of JSON is one document, or an
array of them.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from insula.control.declared.yaml12 import MAX_DEPTH, Marks, NodeLimit, ValuePath, read
from insula.model.declared import MAX_SIZE, DeclaredFile
from insula.model.errors import Invalid
from insula.model.units import shorten

_LONGEST = 500  # characters of a message, which may have a key of the file
_LONGEST_TOML = 1 << 18  # characters: tomllib takes two seconds for a megabyte of small values
_KEY = r"""(?:[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
_DOTTED = re.compile(rf"""(?<![A-Za-z0-9_."'\\-])(?:{_KEY}[ \t]*+\.[ \t]*+){{{MAX_DEPTH}}}""")
"""A key of TOML with more parts than anything has levels. tomllib takes minutes for one with a hundred thousand."""
_PART = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[(\d+)\]")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


@dataclass(frozen=True)
class RawDocument:
    """A document as it was read. `number` is its place in the file, from 1."""

    value: dict[str, Any]
    file: str
    number: int
    marks: Marks = field(default_factory=dict)

    def at(self, path: ValuePath = ()) -> str:
        """Return the place of a value, or of the nearest one around it: FILE:LINE:COLUMN."""
        for length in range(len(path), -1, -1):
            if mark := self.marks.get(path[:length]):
                return f"{self.file}:{mark[0]}:{mark[1]}"
        return f"{self.file}, document {self.number}"

    def refuse(self, message: str, hint: str | None = None, path: ValuePath = ()) -> NoReturn:
        hint = hint or "`insula apply --schema` prints the schema"
        raise Invalid(f"{self.at(path)}: {message[:_LONGEST]}", hint) from None

    def refuse_type(self, message: str) -> NoReturn:
        """Raise Invalid for an error of msgspec, which ends with the path of the value: "… - at `$.spec.image`"."""
        what, _, where = message.partition(" - at `")
        path: ValuePath = tuple(name or int(number) for name, number in _PART.findall(where.rstrip("`")))
        if found := _UNKNOWN.search(what):
            path = (*path, found[1])
        self.refuse(f"{what[:1].lower()}{what[1:]}" + (f" in {where.rstrip('`')[2:]}" if where else ""), path=path)


def parse(files: Sequence[DeclaredFile]) -> Sequence[RawDocument]:
    """Return the documents of all files, in order. Invalid."""
    if sum(len(file.text) for file in files) > MAX_SIZE:
        raise Invalid(f"the files are larger than {MAX_SIZE >> 20} MiB", "apply them in parts")
    budget = NodeLimit()
    return [document for file in files for document in _documents(file, budget)]


def _documents(file: DeclaredFile, budget: NodeLimit) -> Iterator[RawDocument]:
    name = file.name[:200]
    readers = {"yaml": read, "toml": _toml, "json": _json}
    number = 0
    for value, marks in readers[file.format](file.text, name, budget):
        if value is None:  # nothing between two "---"
            continue
        number += 1
        document = RawDocument(value, name, number, marks)
        if not isinstance(value, dict):
            document.refuse(f"a document is a mapping, not {shorten(value)}")
        yield document


def _toml(text: str, where: str, budget: NodeLimit) -> Iterator[tuple[Any, Marks]]:
    if len(text) > _LONGEST_TOML:
        raise Invalid(f"{where}: it is larger than {_LONGEST_TOML >> 10} KiB", "write it as YAML, or apply it in parts")
    if _DOTTED.search(text):
        raise Invalid(f"{where}: a key has more than {MAX_DEPTH} parts", "make it simpler")
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Invalid(f"{where}: {error}", "it is not TOML 1.0") from None
    except RecursionError:
        raise Invalid(f"{where}: it is nested too deeply", "make it simpler") from None
    _check(value, where, budget)
    several = list(value) == ["document"] and isinstance(value["document"], list)
    yield from ((each, {}) for each in (value["document"] if several else [value] if value else []))


def _json(text: str, where: str, budget: NodeLimit) -> Iterator[tuple[Any, Marks]]:
    if not text.strip():
        return
    try:
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise Invalid(f"{where}:{error.lineno}:{error.colno}: {error.msg}", "it is not JSON") from None
    except ValueError as error:
        raise Invalid(f"{where}: {error}", "correct it") from None
    except RecursionError:
        raise Invalid(f"{where}: it is nested too deeply", "make it simpler") from None
    _check(value, where, budget)
    yield from ((each, {}) for each in (value if isinstance(value, list) else [value]))


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shorten(name)} is there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"the number {shorten(text)} is too large")
    return int(text)


def _check(value: Any, where: str, budget: NodeLimit, depth: int = 0) -> None:
    """Check what is in a value. Invalid."""
    budget.take()
    if depth > MAX_DEPTH:
        raise Invalid(f"{where}: it is nested more than {MAX_DEPTH} levels deep", "make it simpler")
    if isinstance(value, dict):
        for key, each in value.items():
            _check(key, where, budget)
            _check(each, where, budget, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _check(each, where, budget, depth + 1)
    elif isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise Invalid(f"{where}: {shorten(value)} has half a character", "a surrogate is no character of its own")
    elif isinstance(value, float) and not math.isfinite(value):
        raise Invalid(f"{where}: {value} is not a finite number", "correct it")
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise Invalid(f"{where}: the number {shorten(value)} is too large", "quote it if it is a string")
    elif not isinstance(value, str | int | float | bool | None):
        raise Invalid(f"{where}: {shorten(str(value))} is a time", "quote it if it is a string")
