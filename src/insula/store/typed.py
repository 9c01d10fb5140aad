"""Typed objects in the store: where each kind lives, and its JSON.

    instances = Keyspace("/instances", Instance, 2)
    await store.transact([instances.absent("acme", "web")], [instances.put(web, "acme", "web")])
    found = await instances.get(store, "acme", "web")      # Found(value=Instance(…), revision=17)

The JSON is msgspec's. What is stored is decoded leniently, so that several versions can share a store: fields that this
version doesn't know are left out, and an object in an older form is brought forward by `upgrade`, a function from
builtins to builtins. Values of the wrong type are damage. Objects in their usual form cost nothing of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import msgspec.inspect

from insula.model.errors import Failed
from insula.store.protocol import Compare, Delete, Entry, Put, Snapshot, Store

T = TypeVar("T")
_TURN = 1 << 18  # bytes that are decoded in a row, before others have their turn


Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


class Found(NamedTuple, Generic[T]):
    """An object and the revision of its last change."""

    value: T
    revision: int


class Keyspace(Generic[T]):
    """Objects of one type below `root`, named by `depth` parts; only the last part may hold slashes."""

    def __init__(self, root: str, kind: type[T], depth: int, upgrade: Upgrade | None = None) -> None:
        self.root = root
        self.depth = depth
        self._kind = kind
        self._upgrade = upgrade
        self._decoder = msgspec.json.Decoder(kind)
        self._encoder = msgspec.json.Encoder()

    def key(self, *parts: str) -> str:
        if len(parts) != self.depth or not all(parts) or any("/" in part for part in parts[:-1]):
            raise ValueError(f"{parts} doesn't name anything below {self.root}")
        return "/".join((self.root, *parts))

    def prefix(self, *parts: str) -> str:
        """The prefix of all keys that begin with these parts."""
        if len(parts) >= self.depth or not all(parts) or any("/" in part for part in parts):
            raise ValueError(f"{parts} is no prefix below {self.root}")
        return "/".join((self.root, *parts, ""))

    def prefix_all(self) -> str:
        """The prefix of everything of this kind."""
        return f"{self.root}/"

    def parts(self, key: str) -> tuple[str, ...]:
        """The inverse of `key`."""
        return tuple(key[len(self.root) + 1 :].split("/", self.depth - 1))

    def decode(self, entry: Entry) -> T:
        try:
            return self._decoder.decode(entry.value)
        except msgspec.ValidationError:
            return self._lenient(entry)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise _damaged(entry, error) from error

    def _lenient(self, entry: Entry) -> T:
        """An object of another version. Failed if it is none."""
        try:
            value = msgspec.json.decode(entry.value)
            if self._upgrade:
                value = self._upgrade(value)
            return msgspec.convert(known_fields(value, self._kind), self._kind)
        except (msgspec.MsgspecError, UnicodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(entry, error) from error

    def put(self, value: T, *parts: str, lease: int | None = None) -> Put:
        return Put(self.key(*parts), self._encoder.encode(value), lease)

    def delete(self, *parts: str) -> Delete:
        return Delete(self.key(*parts))

    def absent(self, *parts: str) -> Compare:
        return Compare(self.key(*parts), 0)

    def unchanged(self, found: Found[T], *parts: str) -> Compare:
        return Compare(self.key(*parts), found.revision)

    async def get(self, store: Store, *parts: str) -> Found[T] | None:
        entry = await store.get(self.key(*parts))
        return Found(self.decode(entry), entry.revision) if entry else None

    async def list(self, store: Store, *parts: str) -> list[T]:
        """In key order; those of everybody without parts. Failed if one of them is damaged."""
        return [*await self.decode_all((await self._entries(store, *parts)).entries)]

    async def decode_all(self, entries: Iterable[Entry]) -> Sequence[T]:
        """The objects in these entries. Failed if one of them is damaged."""
        return [self.decode(entry) async for entry in _in_turns(entries)]

    async def _entries(self, store: Store, *parts: str) -> Snapshot:
        return await store.list(self.prefix(*parts) if parts else self.prefix_all())

    async def readable(self, store: Store, *parts: str) -> Sequence[T]:
        """The same without those that are damaged: to show, and never to conclude that something is not there."""
        found = []
        async for entry in _in_turns((await self._entries(store, *parts)).entries):
            with contextlib.suppress(Failed):
                found.append(self.decode(entry))
        return found

    def sort_out(self, entries: Iterable[Entry]) -> tuple[Sequence[Found[T]], Sequence[tuple[Entry, Failed]]]:
        """Entries of this kind: the objects, and the entries that hold none with the reason."""
        good, bad = [], []
        for entry in entries:
            try:
                good.append(Found(self.decode(entry), entry.revision))
            except Failed as error:
                bad.append((entry, error))
        return good, bad


async def _in_turns(entries: Iterable[Entry]) -> AsyncIterator[Entry]:
    """The entries. Other tasks have their turn in between: one may hold a megabyte, and a tenant may have thousands."""
    taken = 0
    for entry in entries:
        taken += len(entry.value)
        if taken > _TURN:
            await asyncio.sleep(0)
            taken = 0
        yield entry


_type_info = functools.cache(msgspec.inspect.type_info)  # a millisecond for an instance


def known_fields(value: Any, kind: Any) -> Any:
    """`value` without what `kind`, a type that msgspec decodes, has no fields for."""
    return _known(value, _type_info(kind))


def _known(value: Any, info: msgspec.inspect.Type) -> Any:
    match info:
        case msgspec.inspect.StructType():
            return _known_struct(value, info)
        case msgspec.inspect.UnionType():
            for member in info.types:
                if isinstance(member, msgspec.inspect.StructType) and isinstance(value, dict):
                    if member.tag is None or value.get(member.tag_field or "") == member.tag:
                        return _known_struct(value, member)
                elif isinstance(member, msgspec.inspect.ListType) and isinstance(value, list):
                    return _known(value, member)
            return value
        case msgspec.inspect.ListType() if isinstance(value, list):
            return [_known(each, info.item_type) for each in value]
        case msgspec.inspect.DictType() if isinstance(value, dict):
            return {key: _known(each, info.value_type) for key, each in value.items()}
    return value


def _known_struct(value: Any, info: msgspec.inspect.StructType) -> Any:
    if not isinstance(value, dict):
        return value
    fields = {field.encode_name: field.type for field in info.fields}
    known = {name: _known(each, fields[name]) for name, each in value.items() if name in fields}
    return {**known, info.tag_field: value[info.tag_field]} if info.tag_field and info.tag_field in value else known


def _damaged(entry: Entry, error: Exception) -> Failed:
    return Failed(f"the state at {entry.key} is damaged: {error}", "restore the state")
