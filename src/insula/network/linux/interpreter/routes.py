"""Routing as the kernel does it: rules choose tables, where the longest prefix wins (rtnetlink(7), ip-rule(8)).

A rule with a selector (a mark, a device, an address) may apply or not, so the results of both are possible.
"""

from __future__ import annotations

import functools
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from insula.kernel.netlink import attributes
from insula.network.interpreter.space import BITS, NumberRange

_ROUTE: Final = struct.Struct("=8BI")
_DST, _OIF, _GATEWAY, _PRIORITY, _MULTIPATH, _TABLE = 1, 4, 5, 6, 9, 15
LOCAL: Final = 2
_UNICAST, _BROADCAST, _ANYCAST, _MULTICAST = 1, 3, 4, 5
_RULE_DEVICE, _RULE_PRIORITY, _RULE_SHORT, _RULE_TABLE = 3, 6, 14, 15
_KNOWN: Final = frozenset({_RULE_DEVICE, _RULE_PRIORITY, _RULE_SHORT, _RULE_TABLE, 18, 21})  # also padding, protocol
_NONE: Final = 0xFFFFFFFF  # no such prefix length
_INVERTED: Final = 2  # FIB_RULE_INVERT
_TO_TABLE: Final = 1
FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}


_GROUPS: Final = {  # multicast, and the broadcast address of every link (RFC 1112, RFC 919, RFC 4291)
    4: (NumberRange(224 << 24, (240 << 24) - 1), NumberRange((1 << 32) - 1, (1 << 32) - 1)),
    6: (NumberRange(0xFF << 120, (1 << 128) - 1),),
}


def is_group(version: int, target: NumberRange) -> bool:
    """Whether these addresses are groups of stations, whatever the routes."""
    return any(each.low <= target.low and target.high <= each.high for each in _GROUPS[version])


def is_link_local(version: int, target: NumberRange) -> bool:
    """Whether these addresses are of one link: packets to them leave by the device that they came from, or not at all
    (rt6_need_strict of Linux's net/ipv6/route.c; of IPv4 there is no such rule)."""
    return version == 6 and target.low >> 118 == target.high >> 118 == 0xFE80 >> 6


class NextHop(NamedTuple):
    """Where a route leads: the index of the device, and the gateway's address if it has one."""

    device: int
    gateway: int | None


@dataclass(frozen=True)
class InstalledRoute:
    """`local`: packets to it are for this stack itself. A route without next hops refuses packets."""

    range: NumberRange
    length: int
    table: int
    metric: int
    local: bool
    hops: tuple[NextHop, ...]
    kind: int = _UNICAST


@dataclass(frozen=True)
class RoutingRule:
    """`table` is None if the rule refuses packets. `device` is the only one of arrival that it is about, None for all.
    `always`: it has no other selector. Routes whose prefix is not longer than `short` don't count."""

    priority: int
    table: int | None
    always: bool
    device: str | None = None
    short: int = -1

    def applies(self, device: str | None) -> tuple[bool, bool]:
        """Return whether the rule certainly applies to packets that arrived by a device, and whether it may; for the
        device None it is not known."""
        if self.device is None or self.device == device:
            return self.always, True
        return False, device is None


class RoutingTable:
    """The routes and rules of one version of IP."""

    def __init__(self, version: int, routes: Iterable[InstalledRoute], rules: Iterable[RoutingRule]) -> None:
        self.version = version
        self.routes = list(routes)
        self.rules = sorted(rules, key=lambda each: each.priority)
        self._tables: dict[int, list[InstalledRoute]] = {}
        for route in self.routes:
            self._tables.setdefault(route.table, []).append(route)
        for table in self._tables.values():
            table.sort(key=lambda each: (-each.length, each.metric))

    def lookup(self, target: NumberRange, device: str | None = None) -> Sequence[InstalledRoute]:
        """Return the routes that packets to an atom may take; none if there is no route. `device` is that by which they
        have arrived, "lo" for packets of this stack itself, None if it is not known."""
        found: list[InstalledRoute] = []
        for rule in self.rules:
            certain, possible = rule.applies(device)
            if not possible:
                continue
            routes = self._in_table(rule.table, target) if rule.table is not None else []
            routes = [each for each in routes if each.length > rule.short]
            found += [each for each in routes if each not in found]
            if certain and (routes or rule.table is None):
                break
        return found

    def _in_table(self, table: int, target: NumberRange) -> list[InstalledRoute]:
        for route in self._tables.get(table, ()):
            if route.range.low <= target.low and target.high <= route.range.high:
                same = (route.length, route.metric)
                return [
                    each
                    for each in self._tables[table]
                    if (each.length, each.metric) == same and each.range == route.range
                ]
        return []


@functools.lru_cache(maxsize=8192)
def parse_route(body: bytes) -> InstalledRoute | None:
    """Parse an RTM_NEWROUTE message; None for routes that no unicast packet takes."""
    family, length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(body)
    version = 6 if family == socket.AF_INET6 else 4
    parts = attributes.parse(body[_ROUTE.size :])
    if kind == _MULTICAST:
        return None
    bits = BITS[version]
    low = int.from_bytes(parts.get(_DST, b""), "big")
    hops = list(_hops(parts)) if kind in (_UNICAST, LOCAL, _BROADCAST, _ANYCAST) else []
    return InstalledRoute(
        range=NumberRange(low, low | (1 << bits - length) - 1),
        length=length,
        table=attributes.integer(parts[_TABLE]) if _TABLE in parts else table,
        metric=attributes.integer(parts[_PRIORITY]) if _PRIORITY in parts else 0,
        local=kind in (LOCAL, _BROADCAST, _ANYCAST),
        hops=tuple(hops),
        kind=kind,
    )


def _hops(parts: dict[int, bytes]) -> Iterator[NextHop]:
    if _OIF in parts:
        yield NextHop(attributes.integer(parts[_OIF]), _address(parts.get(_GATEWAY)))
    packed = parts.get(_MULTIPATH, b"")
    while len(packed) >= 8:
        size, _, _, device = struct.unpack_from("=HBBi", packed)
        if size < 8:
            break
        yield NextHop(device, _address(attributes.parse(packed[8:size]).get(_GATEWAY)))
        packed = packed[-(-size // 4) * 4 :]


def _address(packed: bytes | None) -> int | None:
    return None if packed is None else int.from_bytes(packed, "big")


@functools.lru_cache(maxsize=1024)
def parse_rule(body: bytes) -> RoutingRule:
    """Parse an RTM_NEWRULE message (struct fib_rule_hdr, linux/fib_rules.h)."""
    _, to_length, from_length, tos, table, _, _, action, flags = _ROUTE.unpack_from(body)
    parts = attributes.parse(body[_ROUTE.size :])
    number = attributes.integer(parts[_RULE_TABLE]) if _RULE_TABLE in parts else table
    plain = not (to_length or from_length or tos or flags & _INVERTED) and set(parts) <= _KNOWN
    short = attributes.integer(parts[_RULE_SHORT]) if _RULE_SHORT in parts else _NONE
    return RoutingRule(
        priority=attributes.integer(parts[_RULE_PRIORITY]) if _RULE_PRIORITY in parts else 0,
        table=number if action == _TO_TABLE else None,
        always=plain,
        device=attributes.string(parts[_RULE_DEVICE]) if _RULE_DEVICE in parts and not flags & _INVERTED else None,
        short=-1 if short == _NONE else short,
    )
