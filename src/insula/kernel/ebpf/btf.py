"""BTF: the kernel's description of its own functions and structures (Documentation/bpf/btf.rst).

/sys/kernel/btf/vmlinux has a header, then the types, numbered from 1 on, then their names. A type has three words of
32 bits: the offset of its name; its kind and number of members; its size or another type's number. Its members follow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_FILE = Path("/sys/kernel/btf/vmlinux")
_HEADER = struct.Struct("=HBBIIIII")
_MAGIC = 0xEB9F
_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _ENUM64 = 1, 3, 4, 5, 6, 19
_FUNC, _PROTO, _VAR, _SECTION, _TAG = 12, 13, 14, 15, 17
_FIXED = {_INT: 1, _ARRAY: 3, _VAR: 1, _TAG: 1}  # words that follow
_EACH = {_STRUCT: 3, _UNION: 3, _ENUM: 2, _PROTO: 2, _SECTION: 3, _ENUM64: 3}  # words that follow for each part


class Types:
    """The types of the running kernel. OSError without BTF (CONFIG_DEBUG_INFO_BTF)."""

    def __init__(self) -> None:
        data = _FILE.read_bytes()
        magic, _, _, head, types, types_size, names, names_size = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise OSError(f"{_FILE} is no BTF of this machine")
        self._types = memoryview(data[head + types : head + types + types_size]).cast("I")
        self._names = data[head + names : head + names + names_size]

    def find(self, functions: set[str], members: set[tuple[str, str]]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the type numbers of functions, and offsets in bytes of members by "struct.member". OSError."""
        wanted = {(_FUNC, place): name for name in functions for place in self._name_offsets(name)}
        wanted |= {(_STRUCT, place): name for name, _ in members for place in self._name_offsets(name)}
        numbers: dict[str, int] = {}
        offsets: dict[str, int] = {}
        for (kind, name), number, at in self._walk(wanted):
            if kind == _FUNC:
                numbers[name] = number
            else:
                offsets |= {f"{name}.{member}": offset for member, offset in self._members(at)}
        needed = {".".join(pair) for pair in members}
        if missing := functions - numbers.keys() | needed - offsets.keys():
            raise OSError(f"the kernel's BTF has no {', '.join(sorted(missing))}")
        return numbers, {name: offsets[name] for name in needed}

    def _name_offsets(self, name: str) -> Iterator[int]:
        """Return the offsets of a name in the table of names, which may have it more than once."""
        whole, place = b"\0" + name.encode() + b"\0", -1
        while (place := self._names.find(whole, place + 1)) >= 0:
            yield place + 1

    def _walk(self, wanted: dict[tuple[int, int], str]) -> Iterator[tuple[tuple[int, str], int, int]]:
        """Yield (kind and name, type number, offset of the type) for types whose kind and name offset are in `wanted`.

        A kernel has about a hundred thousand types: this takes 0.1 s.
        """
        types, end = self._types, len(self._types)
        fixed = [3 + _FIXED.get(kind, 0) for kind in range(32)]
        each = [_EACH.get(kind, 0) for kind in range(32)]
        places = {place for _, place in wanted}
        at, number = 0, 1
        while at < end:
            info = types[at + 1]
            kind = info >> 24 & 31
            if types[at] in places and (name := wanted.get((kind, types[at]))) is not None:
                yield (kind, name), number, at
            at += fixed[kind] + each[kind] * (info & 0xFFFF)
            number += 1

    def _members(self, at: int) -> Iterator[tuple[str, int]]:
        for index in range(self._types[at + 1] & 0xFFFF):
            place, _, bits = self._types[at + 3 + 3 * index : at + 6 + 3 * index]
            name = self._names[place : self._names.index(b"\0", place)].decode(errors="replace")
            yield name, (bits & 0xFFFFFF) // 8  # its upper byte is the size of a bit field
