"""Classes of addresses: those that no rule of the tenant's policies tells apart.

Rules tell addresses apart by *conditions*: labels of the instance, its network, and ranges of addresses. A class is the
set of conditions that hold for an address. Ranges overlap, so they are cut into disjoint pieces first; an address in a
piece is in all ranges that contain it.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_network
from itertools import pairwise
from typing import Final, NamedTuple

from insula.model.policies import Selector

Conditions = frozenset[tuple[str, str, frozenset[str]]]
"""A selector in canonical form: (key, operator, values). None at all selects everything."""
EVERY_INSTANCE: Final[Conditions] = frozenset()


class Range(NamedTuple):
    """A range of addresses as a rule names it: some CIDRs without others."""

    cidrs: tuple[str, ...]
    without: tuple[str, ...] = ()


class AddressClass(NamedTuple):
    """What holds for the addresses of one class. `network` is None outside of the tenant's networks. `selectors` are
    those that select the instance; an address without an instance has None. So has one that instances with different
    labels or networks may use; `shared` are the selectors that select one of these."""

    network: str | None
    selectors: frozenset[Conditions] | None
    ranges: frozenset[Range]
    shared: frozenset[Conditions] | None = None

    @property
    def is_instance(self) -> bool:
        return self.selectors is not None

    @property
    def is_vacant(self) -> bool:
        """Whether its addresses are of a network, and no instance has them: nothing comes from there."""
        return self.network is not None and not self.is_instance


class RangePiece(NamedTuple):
    """The addresses from `first` to `last` of an IP version, which are of one class unless an instance has them."""

    version: int
    first: int
    last: int
    kind: AddressClass


def conditions(selector: Selector) -> Conditions:
    """Return the canonical form of a selector."""
    found = [(key, "In", frozenset({value})) for key, value in selector.labels.items()]
    found += [(each.key, each.operator, frozenset(each.values)) for each in selector.expressions]
    return frozenset(found)


def class_text(kind: AddressClass) -> str:
    """Return a text that no other class has."""
    selectors = sorted(map(_selector_text, kind.selectors)) if kind.selectors is not None else None
    shared = () if kind.shared is None else (sorted(map(_selector_text, kind.shared)),)
    return repr((kind.network, selectors, sorted(kind.ranges), *shared))


@functools.lru_cache(maxsize=1 << 14)
def _selector_text(selector: Conditions) -> str:
    return repr(sorted((key, operator, sorted(values)) for key, operator, values in selector))


# -- labels ------------------------------------------------------------------------------------------------------------


class SelectorIndex:
    """Finds the selectors that select given labels. Most ask for one value of a label, and are found by it."""

    def __init__(self, selectors: Iterable[Conditions]) -> None:
        self._by_label: dict[tuple[str, str], list[Conditions]] = defaultdict(list)
        self._others: list[Conditions] = []
        self._known: dict[frozenset[tuple[str, str]], frozenset[Conditions]] = {}
        self.add(selectors)

    def add(self, selectors: Iterable[Conditions]) -> set[frozenset[tuple[str, str]]]:
        """Add selectors. Return those of the labels asked for so far that one of these selects."""
        changed = set()
        for selector in selectors:
            if selector == EVERY_INSTANCE:
                continue
            exact = min(((k, *v) for k, o, v in selector if o == "In" and len(v) == 1), default=None)
            if exact:
                self._by_label[exact].append(selector)  # type: ignore[index]
            else:
                self._others.append(selector)
            for labels, found in self._known.items():
                if (exact is None or exact in labels) and _holds(selector, dict(labels)):
                    self._known[labels] = found | {selector}
                    changed.add(labels)
        return changed

    def selecting(self, labels: Mapping[str, str]) -> frozenset[Conditions]:
        """Return the selectors that select these labels, without the one that selects everything."""
        key = frozenset(labels.items())
        if (found := self._known.get(key)) is None:
            asked = [*self._others, *(each for pair in key for each in self._by_label.get(pair, ()))]
            found = self._known[key] = frozenset(each for each in asked if _holds(each, labels))
        return found


def _holds(selector: Conditions, labels: Mapping[str, str]) -> bool:
    for key, operator, values in selector:
        value = labels.get(key)
        if operator == "In":
            holds = value is not None and value in values
        elif operator == "NotIn":
            holds = value is None or value not in values
        else:
            holds = (value is not None) == (operator == "Exists")
        if not holds:
            return False
    return True


# -- ranges ------------------------------------------------------------------------------------------------------------


class AddressHolder(NamedTuple):
    """The instances on a network with the same labels, to which an address belongs."""

    network: str
    labels: frozenset[tuple[str, str]]
    selectors: frozenset[Conditions]


Owner = Range | AddressHolder | str
"""What has a CIDR: a range of a rule, an instance with allowed addresses, or a network by its name."""


class RangeCut(NamedTuple):
    """Pieces that are gone, and those that are there instead, in order."""

    gone: dict[RangePiece, None]
    new: dict[RangePiece, None]


class RangeMap:
    """The disjoint pieces of ranges, networks and allowed addresses of both IP versions."""

    def __init__(
        self,
        ranges: Iterable[Range],
        networks: Iterable[tuple[str, str]] = (),
        allowed: Iterable[tuple[AddressHolder, str]] = (),
    ) -> None:
        """`networks` are (name, subnet), `allowed` are CIDRs that instances may use beside their own addresses."""
        wanted: list[tuple[Owner, str, bool]] = [(name, subnet, True) for name, subnet in networks]
        wanted += [(holder, cidr, True) for holder, cidr in allowed]
        for each in ranges:
            wanted += [(each, cidr, True) for cidr in each.cidrs]
            wanted += [(each, cidr, False) for cidr in each.without]
        self.pieces = [piece for version in (4, 6) for piece in _pieces(version, wanted)]
        self._starts = {v: [piece.first for piece in self.pieces if piece.version == v] for v in (4, 6)}
        self._by_version = {v: [piece for piece in self.pieces if piece.version == v] for v in (4, 6)}

    def cut(self, range_: Range, into: RangeCut) -> None:
        """Cut the pieces at the bounds of a range more, and add to `into` which are gone and which are new."""
        wanted: list[tuple[Owner, str, bool]] = [(range_, cidr, True) for cidr in range_.cidrs]
        wanted += [(range_, cidr, False) for cidr in range_.without]
        for version in (4, 6):
            for region in _pieces(version, wanted):
                self._cut(region, into)
        self.pieces = [*self._by_version[4], *self._by_version[6]]

    def _cut(self, region: RangePiece, into: RangeCut) -> None:
        version, first, last, kind = region
        pieces, starts = self._by_version[version], self._starts[version]
        begin, end = bisect_right(starts, first), bisect_right(starts, last)
        if begin and pieces[begin - 1].last >= first:
            begin -= 1
        new, at = list[RangePiece](), first
        for piece in pieces[begin:end]:
            if piece.first < first:
                new.append(piece._replace(last=first - 1))
            if at < piece.first:
                new.append(RangePiece(version, at, piece.first - 1, kind))
            at = min(piece.last, last) + 1
            finer = piece.kind._replace(ranges=piece.kind.ranges | kind.ranges)
            new.append(RangePiece(version, max(piece.first, first), at - 1, finer))
            if piece.last > last:
                new.append(piece._replace(first=last + 1))
            if piece in into.new:
                del into.new[piece]
            else:
                into.gone[piece] = None
        if at <= last:
            new.append(RangePiece(version, at, last, kind))
        pieces[begin:end] = new
        starts[begin:end] = [piece.first for piece in new]
        into.new.update(dict.fromkeys(new))

    def ranges(self, address: str) -> frozenset[Range]:
        """Return the ranges that contain an address."""
        version, number = address_number(address)
        at = bisect_right(self._starts[version], number) - 1
        if at < 0 or (piece := self._by_version[version][at]).last < number:
            return frozenset()
        return piece.kind.ranges


@functools.lru_cache(maxsize=1 << 14)
def address_number(address: str) -> tuple[int, int]:
    """Return the IP version of an address, and its number."""
    one = ip_address(address)
    return one.version, int(one)


def _kind(owners: Iterable[Owner]) -> AddressClass:
    """Return the class of a piece. What instances with different labels may use is of none of them: nothing comes from
    there, and nothing goes there if a policy selects one of them in direction in."""
    found = [*owners]
    ranges = frozenset(each for each in found if isinstance(each, Range))
    holders = {each for each in found if isinstance(each, AddressHolder)}
    if len(holders) > 1:
        return AddressClass("", None, ranges, frozenset().union(*(each.selectors for each in holders)))
    for holder in holders:
        return AddressClass(holder.network, holder.selectors, ranges)
    return AddressClass(next((each for each in found if isinstance(each, str)), None), None, ranges)


def _pieces(version: int, wanted: Sequence[tuple[Owner, str, bool]]) -> Iterable[RangePiece]:
    """Sweep over the bounds of all CIDRs of one version. Between two bounds, what contains an address is what begins
    below it more often than it ends there; one exception takes it out."""
    events: dict[int, list[tuple[Owner, bool, int]]] = defaultdict(list)
    for owner, cidr, inside in wanted:
        network = _network(cidr)
        if network.version == version:
            events[int(network.network_address)].append((owner, inside, 1))
            events[int(network.broadcast_address) + 1].append((owner, inside, -1))
    within: dict[tuple[Owner, bool], int] = defaultdict(int)
    bounds = sorted(events)
    previous: RangePiece | None = None
    for start, end in pairwise(bounds):
        for owner, inside, step in events[start]:
            within[owner, inside] += step
            if not within[owner, inside]:
                del within[owner, inside]
        kind = _kind(each for each, inside in within if inside and (each, False) not in within)
        if kind == NOWHERE:
            continue
        if previous and previous.kind == kind and previous.last == start - 1:
            previous = RangePiece(version, previous.first, end - 1, kind)
        else:
            if previous:
                yield previous
            previous = RangePiece(version, start, end - 1, kind)
    if previous:
        yield previous


NOWHERE: Final = AddressClass(None, None, frozenset())
"""The class of addresses that no rule names."""

_network = functools.lru_cache(maxsize=1 << 14)(ip_network)
