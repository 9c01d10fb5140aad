"""The kernel's form of what the compiler has found: elements of the sets and maps of chains.py.

Numbers are in the byte order of the host. For a look-up in a concatenation with intervals, nft(8) converts them to
network byte order, and some versions do not: so `port_ranges` has each interval under both.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from socket import AF_INET, AF_INET6, inet_pton
from typing import Final

from insula.kernel.netlink import Request, intervals, maps
from insula.kernel.netlink.maps import KeyInterval
from insula.kernel.netlink.nftables import NftablesSocket
from insula.model.policies import Direction
from insula.network.linux import keys
from insula.network.linux.policy.classes import RangePiece
from insula.network.linux.policy.compiler import DIRECTIONS, Compiled, CompiledChange, Grants
from insula.network.linux.policy.numbers import swapped
from insula.network.linux.policy.operator import Cell, CompiledOperator, interval_number
from insula.network.linux.policy.population import Refinement
from insula.network.linux.policy.port_sets import EVERYTHING, PROTOCOLS, PortInterval, PortSet

SetContents = dict[str, dict[KeyInterval, bytes]]
"""The elements of each set or map, value by key; the value is empty in a set."""

FEW_PORTS: Final = 16
"""Intervals of so many ports are single elements: a set of intervals is slower to change the larger it is."""
_INTERVALS: Final = (
    "ranges4", "ranges6", "subject_ranges4", "subject_ranges6", "operator4", "operator6",
    "operator_tcp", "operator_udp", "operator_icmp", "operator_icmpv6",
)  # fmt: skip
_ADDRESSES: Final = (
    "subjects4", "subjects6", "peers4", "peers6", "ranges4", "ranges6", "subject_ranges4", "subject_ranges6",
)  # fmt: skip
_EXACT: Final = (
    "subjects4", "subjects6", "peers4", "peers6",
    "unknown", "without_dns", "everything", "protocols", "ports",
    *(f"{kind}{name}_{direction}" for direction in DIRECTIONS for kind in ("", "audit_")
      for name in ("isolated", "pairs", "to_all")),
    *(f"operator_{action}_{direction}" for direction in DIRECTIONS for action in ("accept", "deny")),
)  # fmt: skip
GUARDED: Final = "guarded"
"""The set of devices, in the table `bridge`, of instances that policies in direction in select."""
SETS: Final = (*_EXACT, *_INTERVALS, "port_ranges", GUARDED)
"""All sets and maps that the compiler fills, by name."""


def contents(compiled: Compiled, operator: CompiledOperator) -> SetContents:
    """Return the entries of all sets."""
    found: SetContents = {name: {} for name in SETS}
    _add_addresses(found, compiled, compiled.subjects, compiled.pieces)
    found["unknown"] = {KeyInterval(_number(number)): b"" for number in compiled.unknown}
    found["without_dns"] = {KeyInterval(_number(number)): b"" for number in compiled.without_dns}
    for number, ports in compiled.port_sets.items():
        _add_ports(found, number, ports)
    for kind, grants in (("", compiled.enforced), ("audit_", compiled.audited)):
        for direction, each in grants.items():
            _add_grants(found, kind, direction, each)
    found[GUARDED] = _guarded(compiled, compiled.devices)
    _add_operator(found, operator)
    return found


def _add_addresses(
    found: SetContents, compiled: Compiled, addresses: Iterable[str], pieces: Iterable[tuple[RangePiece, int]]
) -> None:
    """Add the classes of some addresses of instances, and of pieces of ranges."""
    for name in _ADDRESSES:
        found.setdefault(name, {})
    for address in addresses:
        add_address(found, address, compiled.subjects[address])
    for piece, number in pieces:
        _add_piece(found, "ranges", piece, number)
        if piece.kind.is_instance or piece.kind.shared is not None:
            _add_piece(found, "subject_ranges", piece, number)


def addresses_of(addresses: Iterable[str]) -> Mapping[str, set[KeyInterval]]:
    """Return the keys of addresses of an instance, by set."""
    found: SetContents = {}
    for address in addresses:
        add_address(found, address, 0)
    return {name: {*keys} for name, keys in found.items()}


def add_address(found: SetContents, address: str, number: int) -> None:
    """Add the class of an instance's address."""
    version, packed = (6, inet_pton(AF_INET6, address)) if ":" in address else (4, inet_pton(AF_INET, address))
    for name in ("subjects", "peers"):
        found.setdefault(f"{name}{version}", {})[KeyInterval(packed)] = _number(number)


def _add_piece(found: SetContents, name: str, piece: RangePiece, number: int) -> None:
    length = 4 if piece.version == 4 else 16
    key = KeyInterval(piece.first.to_bytes(length, "big"), piece.last.to_bytes(length, "big"))
    found[f"{name}{piece.version}"][key] = _number(number)


def _add_ports(found: SetContents, number: int, ports: PortSet) -> None:
    if ports == EVERYTHING:
        found["everything"][KeyInterval(_number(number))] = b""
        return
    for interval in ports:
        if interval.is_all:
            found["protocols"][KeyInterval(_head(number, interval))] = b""
        elif interval.last - interval.first < FEW_PORTS:
            for port in range(interval.first, interval.last + 1):
                found["ports"][KeyInterval(_head(number, interval) + _padded(port))] = b""
        else:
            for each in (number, swapped(number)):
                head = _head(each, interval)
                found["port_ranges"][KeyInterval(head + _padded(interval.first), head + _padded(interval.last))] = b""


def _head(number: int, interval: PortInterval) -> bytes:
    return _number(number) + bytes((interval.protocol, 0, 0, 0))


def _add_grants(found: SetContents, kind: str, direction: Direction, grants: Grants) -> None:
    found[f"{kind}isolated_{direction}"] = {KeyInterval(_number(number)): b"" for number in grants.isolated}
    found[f"{kind}to_all_{direction}"] = {KeyInterval(_number(s)): _number(p) for s, p in grants.to_all.items()}
    found[f"{kind}pairs_{direction}"] = {
        KeyInterval(_number(subject) + _number(other)): _number(ports)
        for subject, others in grants.pairs.items()
        for other, ports in others.items()
    }


def difference(before: Compiled, after: Compiled, changes: CompiledChange) -> tuple[SetContents, SetContents]:
    """Return the elements of what differs between two compilations: those of before, and those of after."""
    found: tuple[SetContents, SetContents] = ({}, {})
    subjects, finer = changes
    if finer != Refinement():
        for contents_, compiled, pieces in zip(found, (before, after), (finer.gone, finer.new), strict=True):
            _add_addresses(contents_, compiled, finer.addresses, pieces)
            contents_["unknown"] = {KeyInterval(_number(number)): b"" for number in compiled.unknown}
    for contents_, compiled in zip(found, (before, after), strict=True):
        contents_["without_dns"] = {KeyInterval(_number(number)): b"" for number in compiled.without_dns}
        contents_[GUARDED] = _guarded(compiled, subjects)
        for name in ("everything", "protocols", "ports", "port_ranges"):
            contents_[name] = {}
        for number in after.port_sets.keys() - before.port_sets.keys():
            if number in compiled.port_sets:
                _add_ports(contents_, number, compiled.port_sets[number])
        for kind, grants in (("", compiled.enforced), ("audit_", compiled.audited)):
            for direction, each in grants.items():
                _add_grants(contents_, kind, direction, each.only(subjects))
    return found


def _guarded(compiled: Compiled, subjects: Iterable[int]) -> dict[KeyInterval, bytes]:
    """Return the elements of devices of those of some subjects that are selected in direction in."""
    isolated = compiled.enforced["in"].isolated.intersection(subjects)
    return {device(each): b"" for number in isolated for each in compiled.devices.get(number, ())}


def device(name: str) -> KeyInterval:
    """Return the key of a device."""
    return KeyInterval(keys.packed("d", (name,)))


def _add_operator(found: SetContents, operator: CompiledOperator) -> None:
    for piece, number in operator.pieces:
        _add_piece(found, "operator", piece, number)
    for protocol, number in PROTOCOLS.items():
        of_protocol = (each for each in operator.intervals if each.protocol == number)
        found[f"operator_{protocol}"] = {_interval(each): _number(interval_number(each)) for each in of_protocol}
    for direction in DIRECTIONS:
        found[f"operator_accept_{direction}"] = _cells(operator.accepted[direction])
        found[f"operator_deny_{direction}"] = _cells(operator.denied[direction])


def _cells(cells: Iterable[Cell]) -> dict[KeyInterval, bytes]:
    return {KeyInterval(_number(cell.address) + _number(cell.ports)): b"" for cell in cells}


def _interval(interval: PortInterval) -> KeyInterval:
    return KeyInterval(interval.first.to_bytes(2, "big"), interval.last.to_bytes(2, "big"))


def _number(number: int) -> bytes:
    return struct.pack("=I", number)


def _padded(port: int) -> bytes:
    return port.to_bytes(2, "big") + b"\0\0"


# -- changes -----------------------------------------------------------------------------------------------------------


def read(socket: NftablesSocket, table: str) -> SetContents:
    """Read the elements of all sets."""
    return {
        name: intervals.read(socket, table, name)
        if name in _INTERVALS
        else maps.read(socket, _family(name), table, name)
        for name in SETS
    }


def changes(table: str, have: SetContents, wanted: SetContents) -> list[Request]:
    """Return requests that change the sets of `wanted` from what they have. What is to go is deleted first: a key has
    one value, and intervals don't overlap."""
    deleted: list[Request] = []
    added: list[Request] = []
    for name, want in wanted.items():
        now = have.get(name, {})
        gone = [key for key, value in now.items() if want.get(key) != value]
        new = {key: value for key, value in want.items() if now.get(key) != value}
        if name in _INTERVALS:
            deleted += intervals.delete(table, name, gone)
            added += intervals.add(table, name, new)
        else:
            deleted += maps.delete(_family(name), table, name, gone)
            added += maps.add(_family(name), table, name, new)
    return [*deleted, *added]


def _family(name: str) -> str:
    return "bridge" if name == GUARDED else "inet"
