"""The first step of the check of a config: compare a value with the table in `config.schema`."""

from __future__ import annotations

from insula.container.config import schema
from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.container.config.schema import Kind

HINT = "see config.md and config-linux.md of the OCI runtime-spec"


class Wrong(Exception):
    """A value is wrong. `place` is the path of its field, to which each caller adds its part at the front."""

    def __init__(self, complaint: str, hint: str = HINT, *place: str | int) -> None:
        super().__init__(complaint)
        self.complaint = complaint
        self.hint = hint
        self.place = list(reversed(place))

    def invalid(self, prefix: str = "") -> Invalid:
        """The error for the caller: the field's path, what is wrong with it, and a hint."""
        path = prefix
        for step in reversed(self.place):
            if isinstance(step, int):
                path += f"[{step}]"
            else:
                plain = step and len(step) <= 60 and not set(step) - _PLAIN
                path += f".{step}" if plain else f"[{quoted(step)}]"
        complaint = self.complaint
        if path.startswith(".linux.memoryPolicy."):
            complaint += f": invalid memory policy {path.split('.')[3].partition('[')[0].removesuffix('s')}"  # as runc
        return Invalid(f"{path.lstrip('.') or 'the config'}: {complaint}", self.hint)


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-/.")


def quoted(value: object) -> str:
    """`value` for an error message: on one line, and not long."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, int) and value.bit_length() > 128:  # Python makes no text of a huge one
        return "a huge number"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:56]}...'"


class _Object:
    """A dict of the table, with its required fields set apart."""

    def __init__(self, fields: dict[Any, Kind]) -> None:
        self.every = _prepare(fields[str]) if str in fields else None
        self.fields = {name.rstrip("!"): _prepare(kind) for name, kind in fields.items() if name is not str}
        self.required = [name[:-1] for name in fields if name is not str and name.endswith("!")]


def _prepare(kind: Any) -> Any:
    if type(kind) is dict:
        return _Object(kind)
    return [_prepare(kind[0])] if type(kind) is list else kind


def walk(value: Any, kind: Any) -> None:
    """Raise Wrong unless `value` is of `kind`; drop the nulls in it."""
    shape = type(kind)
    if kind is bool:
        if type(value) is not bool:
            raise Wrong(f"{quoted(value)} is not true or false")
    elif shape is range:
        _number(value, kind)
    elif shape is list:
        _array(value, kind[0])
    elif shape is _Object:
        _object(value, kind)
    else:
        _text(value, kind)


def _text(value: Any, kind: Any) -> None:
    if type(value) is not str:
        raise Wrong(f"{quoted(value)} is not a string")
    if "\0" in value:
        raise Wrong(f"{quoted(value)} has a NUL byte", "the kernel takes it for the end")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Wrong(f"{quoted(value)} has half of a surrogate pair", "write UTF-8") from None
    if type(kind) is tuple:
        if value not in kind:
            raise Wrong(f"{quoted(value)} is unknown", f"use one of {', '.join(kind)}")
    elif kind is not str and (complaint := kind(value)):
        raise Wrong(f"{quoted(value)} {complaint}" if value else complaint)


def _number(value: Any, kind: range) -> None:
    if type(value) is not int:
        raise Wrong(f"{quoted(value)} is not a whole number")
    if not kind.start <= value < kind.stop:
        raise Wrong(f"{quoted(value)} is not from {kind.start} to {kind.stop - 1}")


def _array(value: Any, kind: Any) -> None:
    if type(value) is not list:
        raise Wrong(f"{quoted(value)} is not an array")
    index = -1
    try:
        for index, item in enumerate(value):  # noqa: B007
            walk(item, kind)
    except Wrong as wrong:
        wrong.place.append(index)
        raise


def _object(value: Any, kind: _Object) -> None:
    if type(value) is not dict:
        raise Wrong(f"{quoted(value)} is not an object")
    if None in value.values():
        for name in [name for name, field in value.items() if field is None]:
            del value[name]
    for name in kind.required:
        if name not in value:
            raise Wrong("is missing", HINT, name)
    name = ""
    try:
        for name, field in value.items():
            expected = kind.fields.get(name, kind.every)
            if expected is not None:
                if kind.every is not None:
                    _text(name, schema.not_empty)
                walk(field, expected)
    except Wrong as wrong:
        wrong.place.append(name)
        raise


CONFIG = _prepare(schema.CONFIG)
PROCESS = CONFIG.fields["process"]
RESOURCES = CONFIG.fields["linux"].fields["resources"]
