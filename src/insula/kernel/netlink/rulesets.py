"""Read nftables' rule sets as the kernel holds them: tables, chains, rules with their expressions, sets, elements.

The kernel runs a rule as a small program of expressions over 16 registers of 4 bytes (net/netfilter/nf_tables_core.c,
include/uapi/linux/netfilter/nf_tables.h). Here it is read as that program, not as the text that nft(8) makes of it, so
that nothing is lost in translation. Attributes are not interpreted here.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from insula.kernel.netlink import attributes
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netlink.socket import NetlinkError

_NFTABLES: Final = 10
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = (_NFTABLES << 8 | number for number in (1, 4, 7, 10, 13))
FAMILIES: Final = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
SET_INTERVAL, SET_MAP, SET_TIMEOUT, SET_EVAL = 4, 8, 16, 32
ELEMENT_END, ELEMENT_CATCHALL = 1, 2
_DORMANT = 1


@dataclass(frozen=True)
class RawExpression:
    """An expression by its name, such as ``cmp``, with its attributes."""

    name: str
    attributes: Mapping[int, bytes]

    def number(self, attribute: int, default: int = 0) -> int:
        """Return a 32-bit attribute, in network byte order."""
        value = self.attributes.get(attribute)
        return default if value is None else int.from_bytes(value, "big")


@dataclass(frozen=True)
class RawRule:
    """A rule; `packed` are its expressions, which `expressions` parses."""

    handle: int
    packed: bytes


@dataclass(frozen=True)
class RawChain:
    """A chain; `hook` is None if no hook of the kernel calls it. `type` is filter, nat or route."""

    name: str
    hook: int | None
    priority: int
    type: str
    accepts: bool  # the policy
    devices: tuple[str, ...]


@dataclass(frozen=True)
class RawElement:
    """An element: its key, the end of a range of keys, and the data of a map: bytes, or a verdict's attribute."""

    key: bytes
    end: bytes | None
    value: bytes | None
    verdict: bytes | None
    flags: int


@dataclass(frozen=True)
class RawSet:
    """A set or map. `fields` are the lengths of a concatenation's parts, if the kernel was told. `expressions` are the
    names of those that its elements carry, as ``counter`` or ``limit``."""

    name: str
    flags: int
    key_length: int
    data_length: int
    fields: tuple[int, ...]
    expressions: frozenset[str]
    elements: Sequence[RawElement]


@dataclass(frozen=True)
class RawTable:
    family: str
    name: str
    active: bool
    chains: Mapping[str, RawChain]
    rules: Mapping[str, Sequence[RawRule]]  # by chain
    sets: Mapping[str, RawSet]


def dump(socket: NftablesSocket) -> list[tuple[int, bytes]]:
    """Return the bodies of all objects of the namespace with their kinds, in the kernel's encoding.

    Two dumps are equal if nothing has changed. NetlinkError.
    """
    everything = struct.pack("!BBH", 0, 0, 0)
    found = [(kind, body) for kind in (_GETTABLE, _GETCHAIN, _GETRULE) for body in socket.dump(kind, everything)]
    for body in socket.dump(_GETSET, everything):
        found.append((_GETSET, body))
        parts = attributes.parse(body[4:])
        wanted = body[:4] + attributes.attributes((1, parts[1]), (2, parts[2]))
        try:
            found += [(_GETSETELEM, each) for each in socket.dump_elements(wanted)]
        except NetlinkError:  # the set was removed meanwhile
            continue
    return found


def parse(dumped: Sequence[tuple[int, bytes]]) -> list[RawTable]:
    """Return the tables of a dump."""
    chains: dict[tuple[int, bytes], dict[str, RawChain]] = {}
    rules: dict[tuple[int, bytes], dict[str, list[RawRule]]] = {}
    sets: dict[tuple[int, bytes], dict[str, RawSet]] = {}
    tables: dict[tuple[int, bytes], bool] = {}
    elements: dict[tuple[int, bytes, bytes], list[RawElement]] = {}
    for kind, body in dumped:
        parts = attributes.parse(body[4:])
        owner = body[0], parts[1]
        if kind == _GETTABLE:
            tables[owner] = not _number(parts, 2) & _DORMANT
        elif kind == _GETCHAIN:
            chain = _chain(parts)
            chains.setdefault(owner, {})[chain.name] = chain
        elif kind == _GETRULE:
            rules.setdefault(owner, {}).setdefault(attributes.string(parts[2]), []).append(_rule(parts))
        elif kind == _GETSET:
            made = _set(parts, elements.setdefault((*owner, parts[2]), []))
            sets.setdefault(owner, {})[made.name] = made
        else:
            listed = elements.setdefault((*owner, parts[2]), [])
            listed += [_element(packed) for _, packed in attributes.pairs(parts.get(3, b""))]
    return [
        RawTable(
            family=FAMILIES.get(family, str(family)),
            name=attributes.string(name),
            active=active,
            chains=chains.get((family, name), {}),
            rules=rules.get((family, name), {}),
            sets=sets.get((family, name), {}),
        )
        for (family, name), active in tables.items()
    ]


def expressions(packed: bytes) -> tuple[RawExpression, ...]:
    """Parse a list of expressions."""
    found = []
    for _, item in attributes.pairs(packed):
        parts = attributes.parse(item)
        found.append(RawExpression(attributes.string(parts.get(1, b"?")), attributes.parse(parts.get(2, b""))))
    return tuple(found)


def _number(parts: Mapping[int, bytes], attribute: int) -> int:
    return int.from_bytes(parts.get(attribute, b""), "big")


def _chain(parts: Mapping[int, bytes]) -> RawChain:
    hook = attributes.parse(parts[4]) if 4 in parts else None
    devices = []
    if hook:
        devices = [attributes.string(hook[3])] if 3 in hook else []
        devices += [attributes.string(value) for _, value in attributes.pairs(hook.get(4, b""))]
    return RawChain(
        name=attributes.string(parts[3]),
        hook=None if hook is None else _number(hook, 1),
        priority=0 if hook is None else int.from_bytes(hook.get(2, bytes(4)), "big", signed=True),
        type=attributes.string(parts.get(7, b"")),
        accepts=_number(parts, 5) == 1 if 5 in parts else True,
        devices=tuple(devices),
    )


def _rule(parts: Mapping[int, bytes]) -> RawRule:
    return RawRule(_number(parts, 3), parts.get(4, b""))


def _set(parts: Mapping[int, bytes], elements: Sequence[RawElement]) -> RawSet:
    return RawSet(*_shape(*(parts.get(each, b"") for each in (2, 3, 5, 7, 9, 17, 18))), elements)


@functools.lru_cache(maxsize=1024)
def _shape(
    name: bytes, flags: bytes, key: bytes, data: bytes, described: bytes, expression: bytes, several: bytes
) -> tuple[str, int, int, int, tuple[int, ...], frozenset[str]]:
    """Return what a `RawSet` has before its elements. The sets of all tenants are the same."""
    carried = expressions(several) or expressions(attributes.attributes((1, expression)))
    fields = (
        attributes.parse(each).get(1, b"") for _, each in attributes.pairs(attributes.parse(described).get(2, b""))
    )
    return (
        attributes.string(name),
        int.from_bytes(flags, "big"),
        int.from_bytes(key, "big"),
        int.from_bytes(data, "big"),
        tuple(int.from_bytes(each, "big") for each in fields),
        frozenset(each.name for each in carried if each.name != "?"),
    )


def _element(packed: bytes) -> RawElement:
    parts = attributes.parse(packed)
    data = attributes.parse(parts[2]) if 2 in parts else {}
    return RawElement(
        key=attributes.parse(parts[1]).get(1, b"") if 1 in parts else b"",
        end=attributes.parse(parts[10]).get(1) if 10 in parts else None,
        value=data.get(1),
        verdict=data.get(2),
        flags=_number(parts, 3),
    )
