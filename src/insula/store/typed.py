"""Typed objects in the store: the keys of each kind, and its JSON.

    instances = Keyspace("/instances", Instance, 2)
    await store.transact([instances.absent("acme", "web")], [instances.put(web, "acme", "web")])
    found = await instances.get(store, "acme", "web")      # Found(value=Instance(…), revision=17)

Objects are encoded by msgspec. Stored objects are decoded leniently, so that several versions can share a store:
unknown fields are ignored, and an older form is converted by `upgrade`, a function from builtins to builtins. A value
of the wrong type means that the object is damaged. Objects in the current form need no conversion.
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
_TURN = 1 << 18  # bytes that are decoded before other tasks may run


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
            raise ValueError(f"{parts} is not a key below {self.root}")
        return "/".join((self.root, *parts))

    def prefix(self, *parts: str) -> str:
        """Return the prefix of all keys that begin with these parts."""
        if len(parts) >= self.depth or not all(parts) or any("/" in part for part in parts):
            raise ValueError(f"{parts} is not a prefix below {self.root}")
        return "/".join((self.root, *parts, ""))

    def prefix_all(self) -> str:
        """Return the prefix of all objects of this kind."""
        return f"{self.root}/"

    def parts(self, key: str) -> tuple[str, ...]:
        """Return the parts of a key."""
        return tuple(key[len(self.root) + 1 :].split("/", self.depth - 1))

    def decode(self, entry: Entry) -> T:
        try:
            return self._decoder.decode(entry.value)
        except msgspec.ValidationError:
            return self._lenient(entry)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise _damaged(entry, error) from error

    def _lenient(self, entry: Entry) -> T:
        """Decode an object of another version. Failed if it is damaged."""
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
        """Return the objects below these parts, all without parts, in key order. Failed if one is damaged."""
        return [*await self.decode_all((await self._entries(store, *parts)).entries)]

    async def decode_all(self, entries: Iterable[Entry]) -> Sequence[T]:
        """Decode entries. Failed if one is damaged."""
        return [self.decode(entry) async for entry in _in_turns(entries)]

    async def _entries(self, store: Store, *parts: str) -> Snapshot:
        return await store.list(self.prefix(*parts) if parts else self.prefix_all())

    async def readable(self, store: Store, *parts: str) -> Sequence[T]:
        """Return the undamaged objects, for display: an object may exist although it is not among them."""
        found = []
        async for entry in _in_turns((await self._entries(store, *parts)).entries):
            with contextlib.suppress(Failed):
                found.append(self.decode(entry))
        return found

    def sort_out(self, entries: Iterable[Entry]) -> tuple[Sequence[Found[T]], Sequence[tuple[Entry, Failed]]]:
        """Decode entries of this kind; returns the objects, and the damaged entries with their errors."""
        good, bad = [], []
        for entry in entries:
            try:
                good.append(Found(self.decode(entry), entry.revision))
            except Failed as error:
                bad.append((entry, error))
        return good, bad


class DecodedObjects(Generic[T]):
    """Objects of a keyspace that are decoded once in each version, as one reader needs them again and again."""

    def __init__(self, keyspace: Keyspace[T]) -> None:
        self._keyspace = keyspace
        self._known: dict[str, dict[str, Found[T]]] = {}

    def sort_out(self, prefix: str, entries: Iterable[Entry]) -> tuple[Sequence[Found[T]], Sequence[Entry]]:
        """Decode all entries with a prefix; returns the objects, and the damaged entries."""
        known, good, bad = self._known.get(prefix, {}), dict[str, Found[T]](), []
        for entry in entries:
            found = known.get(entry.key)
            if found is None or found.revision != entry.revision:
                try:
                    found = Found(self._keyspace.decode(entry), entry.revision)
                except Failed:
                    bad.append(entry)
                    continue
            good[entry.key] = found
        if good:
            self._known[prefix] = good
        else:
            self._known.pop(prefix, None)
        return [*good.values()], bad


async def _in_turns(entries: Iterable[Entry]) -> AsyncIterator[Entry]:
    """Yield entries, and let other tasks run between them: an entry may have a megabyte, and a tenant thousands."""
    taken = 0
    for entry in entries:
        taken += len(entry.value)
        if taken > _TURN:
            await asyncio.sleep(0)
            taken = 0
        yield entry


_type_info = functools.cache(msgspec.inspect.type_info)  # a millisecond for an instance


def known_fields(value: Any, kind: Any) -> Any:
    """Return `value` without the fields that `kind`, a type that msgspec decodes, doesn't have."""
    return _known(value, _type_info(kind))


def _known(value: Any, info: msgspec.inspect.Type) -> Any:
    match info:
        case msgspec.inspect.Metadata():  # rules for the published schema
            return _known(value, info.type)
        case msgspec.inspect.StructType():
            return _known_struct(value, info)
        case msgspec.inspect.UnionType():
            for each in info.types:
                member = each.type if isinstance(each, msgspec.inspect.Metadata) else each
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
