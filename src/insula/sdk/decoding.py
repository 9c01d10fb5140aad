"""Answers as objects of `insula.model`.

A server that is newer than this package may send members that a struct does not have; they are left out. Some answers
have a form for those who see the host and another one for others (model/own_views.py): the fuller one is tried first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec
from msgspec import inspect

from insula.model.errors import Failed, InsulaError, from_dict
from insula.model.stream import Decoder, Kind
from insula.sdk.types import AuditEntry, EventView

T = TypeVar("T")
U = TypeVar("U")


def of(kind: type[T]) -> Callable[[object], T]:
    """Return what makes an object of JSON that was parsed. Failed if it does not fit."""

    def convert(value: object) -> T:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            pass
        try:
            return msgspec.convert(_known(value, inspect.type_info(kind)), kind)
        except msgspec.ValidationError as error:
            hint = "install the version of this package that the server has"
            raise Failed(f"the answer is not what this client knows: {error}", hint) from None

    return convert


def either(full: type[T], own: type[U]) -> Callable[[object], T | U]:
    """Return what makes an object of one of two types, of the first if it fits."""
    first, second = of(full), of(own)

    def convert(value: object) -> T | U:
        try:
            return first(value)
        except Failed:
            return second(value)

    return convert


def many(one: Callable[[object], T]) -> Callable[[object], Sequence[T]]:
    """Return what makes a list of objects."""

    def convert(value: object) -> Sequence[T]:
        if not isinstance(value, list):
            raise Failed("the answer is no list", "check what listens at this address")
        return [one(each) for each in value]

    return convert


def parsed(data: bytes) -> object:
    """Return JSON as lists, dicts and so on. Failed."""
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        raise Failed("the answer is not JSON", "check what listens at this address") from None


def line(data: bytes) -> object:
    """Return a line of a stream; a problem is raised."""
    value = parsed(data)
    if isinstance(value, dict) and {"error", "message", "hint"} <= value.keys():
        raise problem(value)
    return value


def problem(value: object) -> InsulaError:
    """Return the error that a server tells, as parsed JSON."""
    members = value.items() if isinstance(value, dict) else ()
    return from_dict({name: member for name, member in members if isinstance(member, str)})


def frames(decoder: Decoder, data: bytes) -> Iterator[tuple[Kind, bytes]]:
    """Yield the frames that are complete with `data`; that of an error is raised. Failed for what is no frame."""
    try:
        for kind, payload in decoder.feed(data):
            if kind is Kind.ERROR:
                raise problem(parsed(payload))
            yield kind, payload
    except ValueError as error:
        raise Failed(f"the answer is no sequence of frames: {error}", "check what listens at this address") from None


def event(value: object) -> EventView:
    """Return an event; its members that EventView has no field for are its `details`."""
    return of(EventView)(_with_details(value, EventView))


def entry(value: object) -> AuditEntry:
    """Return an entry of the audit log; its members that AuditEntry has no field for are its `details`."""
    return of(AuditEntry)(_with_details(value, AuditEntry))


def _with_details(value: object, kind: type[msgspec.Struct]) -> object:
    if not isinstance(value, dict):
        return value
    fields = set(kind.__struct_fields__) - {"details"}
    details = {name: member for name, member in value.items() if name not in fields}
    return {**{name: member for name, member in value.items() if name in fields}, "details": details}


def _known(value: object, kind: inspect.Type) -> object:
    """Return parsed JSON without the members that the structs of `kind` do not have."""
    match kind:
        case inspect.Metadata():
            return _known(value, kind.type)
        case inspect.UnionType():
            fitting = [each for each in kind.types if _fits(value, each)]
            return _known(value, fitting[0]) if fitting else value
        case inspect.StructType() if isinstance(value, dict):
            fields = {field.encode_name: field.type for field in kind.fields}
            return {
                name: _known(member, fields[name]) if name in fields else member
                for name, member in value.items()
                if name in fields or name == kind.tag_field
            }
        case inspect.ListType() if isinstance(value, list):
            return [_known(each, kind.item_type) for each in value]
        case inspect.DictType() if isinstance(value, dict):
            return {name: _known(member, kind.value_type) for name, member in value.items()}
    return value


def _fits(value: object, kind: inspect.Type) -> bool:
    """Whether a value may be of one type of a union."""
    if isinstance(kind, inspect.Metadata):
        return _fits(value, kind.type)
    if isinstance(kind, inspect.StructType):
        return isinstance(value, dict) and kind.tag in (None, value.get(kind.tag_field or ""))
    return isinstance(kind, inspect.ListType | inspect.DictType)
