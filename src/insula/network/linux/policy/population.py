"""`Population`: the addresses that a tenant's policies tell apart, each with its class and the number of that.

A selector or a range more makes classes finer: addresses for which it holds go to other classes, and the others stay
where they are. So what it costs depends on how many addresses it is about.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Final, NamedTuple

from insula.network.linux.policy.classes import (
    EVERY_INSTANCE,
    AddressClass,
    AddressHolder,
    Conditions,
    Range,
    RangeCut,
    RangeMap,
    RangePiece,
    SelectorIndex,
    address_number,
    class_text,
)
from insula.network.linux.policy.numbers import class_numbers

MANY: Final = 256
"""Ports or pieces of ranges so many that it is not slower to compile everything than to refine the classes."""


class PolicyMember(NamedTuple):
    """A port of the tenant, on this host or another: its instance, its network, its addresses, the ranges that it may
    use beside these, and its device, which is empty if it is on another host."""

    instance: str
    network: str
    addresses: tuple[str, ...]
    allowed: tuple[str, ...] = ()
    device: str = ""


class Refinement(NamedTuple):
    """What has other classes than before. `before` and `after` are the numbers of the old classes and of the new ones,
    and pieces of ranges have their numbers beside them."""

    addresses: frozenset[str] = frozenset()
    gone: Sequence[tuple[RangePiece, int]] = ()
    new: Sequence[tuple[RangePiece, int]] = ()
    before: frozenset[int] = frozenset()
    after: frozenset[int] = frozenset()

    def then(self, later: Refinement) -> Refinement:
        """Return this one and a later one together. Pieces of ranges are of one of them."""
        return Refinement(
            self.addresses | later.addresses,
            [*self.gone, *later.gone],
            [*self.new, *later.new],
            self.before | later.before,
            self.after | later.after,
        )


class Population:
    """The members and ranges of one tenant. `labels` are those of its instances by name."""

    def __init__(
        self,
        labels: Mapping[str, Mapping[str, str]],
        members: Iterable[PolicyMember],
        subnets: Iterable[tuple[str, str]],
        selectors: Iterable[Conditions],
        ranges: Iterable[Range],
    ) -> None:
        self.labels = labels
        self.selectors, self._asked = {EVERY_INSTANCE, *selectors}, {*ranges}
        self._most = 2 * len(self._asked) + MANY
        self._index = SelectorIndex(self.selectors)
        members = [*members]
        allowed = [(self._holder(member), cidr) for member in members for cidr in member.allowed]
        self._ranges = RangeMap(self._asked, subnets, allowed)
        self.addresses: dict[str, AddressClass] = {}
        self._owner: dict[str, PolicyMember] = {}
        self._by_labels: dict[frozenset[tuple[str, str]], set[PolicyMember]] = defaultdict(set)
        self._sorted: dict[int, list[tuple[int, str]]] = {4: [], 6: []}
        self._uses: Counter[AddressClass] = Counter(piece.kind for piece in self._ranges.pieces)
        self._add_all(members)
        texts = {kind: class_text(kind) for kind in self._uses}
        by_text = class_numbers(texts.values())
        self.numbers = {kind: by_text[text] for kind, text in texts.items()}
        self.kinds = {number: kind for kind, number in self.numbers.items()}
        self.classes_of = ClassIndex(self.numbers)

    def _add_all(self, members: Iterable[PolicyMember]) -> None:
        """Add members. A link-local address that several have, on two networks, is left out: it is unknown, so that
        nothing comes from it."""
        holders: dict[str, AddressHolder] = {}
        ambiguous = set()
        for member in members:
            holder = self._holder(member)
            self._by_labels[holder.labels].add(member)
            for address in member.addresses:
                if holders.setdefault(address, holder) != holder:
                    ambiguous.add(address)
                self._owner[address] = member
        for address in ambiguous:
            del self._owner[address]
        for address, member in self._owner.items():
            version, number = address_number(address)
            self._sorted[version].append((number, address))
            holder = self._holder(member)
            kind = AddressClass(holder.network, holder.selectors, self._ranges.ranges(address))
            self.addresses[address] = kind
            self._uses[kind] += 1
        for some in self._sorted.values():
            some.sort()

    def _holder(self, member: PolicyMember) -> AddressHolder:
        labels = self.labels.get(member.instance, {})
        return AddressHolder(member.network, frozenset(labels.items()), self._index.selecting(labels))

    def classes(self, member: PolicyMember) -> Iterator[tuple[str, AddressClass]]:
        """Yield the addresses of a port with their classes."""
        holder = self._holder(member)
        for address in member.addresses:
            yield address, AddressClass(holder.network, holder.selectors, self._ranges.ranges(address))

    def pieces(self) -> list[tuple[RangePiece, int]]:
        """Return the pieces of ranges with the numbers of their classes."""
        return [(piece, self.numbers[piece.kind]) for piece in self._ranges.pieces]

    def vacant(self, numbers: Iterable[int]) -> set[int]:
        """Return those of some numbers whose classes are of addresses of a network that no instance has."""
        return {number for number in numbers if (kind := self.kinds.get(number)) and kind.is_vacant}

    def devices(self) -> dict[int, set[str]]:
        """Return the devices of members by the numbers of their classes."""
        found: dict[int, set[str]] = defaultdict(set)
        for address, kind in self.addresses.items():
            if device := self._owner[address].device:
                found[self.numbers[kind]].add(device)
        return found

    def device(self, address: str) -> str:
        """Return the device of the port that has an address."""
        return self._owner[address].device

    # -- changes -------------------------------------------------------------------------------------------------

    def add(self, member: PolicyMember) -> None:
        """Add a member whose classes have numbers."""
        self._by_labels[self._holder(member).labels].add(member)
        for address, kind in self.classes(member):
            self._forget(address)
            self._owner[address] = member
            self.addresses[address] = kind
            self._uses[kind] += 1
            version, number = address_number(address)
            insort(self._sorted[version], (number, address))

    def discard(self, member: PolicyMember) -> None:
        """Remove a member; its classes keep their numbers."""
        for some in self._by_labels.values():
            some.discard(member)
        for address in member.addresses:
            if self._owner.get(address) == member:
                self._forget(address)

    def _forget(self, address: str) -> None:
        if (kind := self.addresses.pop(address, None)) is not None:
            del self._owner[address]
            self._uses[kind] -= 1
            version, number = address_number(address)
            at = bisect_left(self._sorted[version], (number, address))
            del self._sorted[version][at]

    def refine(self, selectors: Iterable[Conditions], ranges: Iterable[Range]) -> Refinement | None:
        """Tell apart what these selectors and ranges tell apart as well. None if that concerns too much: then
        everything has to be compiled."""
        selectors, ranges = {*selectors} - self.selectors, {*ranges} - self._asked
        if not selectors and not ranges:
            return Refinement()
        members = {each for labels in self._index.add(selectors) for each in self._by_labels.get(labels, ())}
        bounds = sum(len(range_.cidrs) + len(range_.without) for range_ in ranges)
        if len(members) + bounds > MANY or any(member.allowed for member in members):
            return None
        if len(ranges) + len(self._asked) > self._most:  # most of these are no longer asked for
            return None
        self.selectors |= selectors
        addresses = {address for member in members for address in member.addresses}
        cut = RangeCut({}, {})
        for range_ in ranges:
            self._asked.add(range_)
            self._ranges.cut(range_, cut)
            addresses.update(self._within(range_))
            if len(cut.gone) + len(cut.new) + len(addresses) > MANY:
                return None
        return self._reclassed(addresses, cut)

    def relabel(self, labels: Mapping[str, Mapping[str, str]]) -> Refinement | None:
        """Change the labels of instances. None if that concerns too much: then everything has to be compiled."""
        before, nothing = self.labels, dict[str, str]()
        changed = [n for n in before.keys() | labels.keys() if before.get(n, nothing) != labels.get(n, nothing)]
        if len(changed) > MANY:
            return None
        members = [
            member
            for name in changed
            for member in self._by_labels.get(frozenset(before.get(name, nothing).items()), ())
            if member.instance == name
        ]
        if any(member.allowed for member in members):
            return None
        for member in members:
            self._by_labels[frozenset(before.get(member.instance, nothing).items())].discard(member)
        self.labels = labels
        for member in members:
            self._by_labels[frozenset(labels.get(member.instance, nothing).items())].add(member)
        return self._reclassed({address for member in members for address in member.addresses}, RangeCut({}, {}))

    def _within(self, range_: Range) -> Iterator[str]:
        """Yield the addresses of members that are in a range."""
        for cidr in range_.cidrs:
            network = ip_network(cidr)
            some = self._sorted[network.version]
            first, last = int(network.network_address), int(network.broadcast_address)
            for at in range(bisect_left(some, (first, "")), bisect_right(some, (last, "g"))):  # no address has a g
                yield some[at][1]

    def _reclassed(self, addresses: set[str], cut: RangeCut) -> Refinement:
        moved: dict[str, AddressClass] = {}
        old, fresh = Counter(each.kind for each in cut.gone), Counter(each.kind for each in cut.new)
        for address in addresses:
            if (member := self._owner.get(address)) is None:
                continue
            holder = self._holder(member)
            kind = AddressClass(holder.network, holder.selectors, self._ranges.ranges(address))
            if kind != (before := self.addresses[address]):
                old[before] += 1
                fresh[kind] += 1
                moved[address] = kind
        self._uses.subtract(old)
        self._uses.update(fresh)
        before_numbers = {kind: self.numbers[kind] for kind in old}
        self._number(kind for kind in fresh if kind not in self.numbers)
        self.addresses |= moved
        found = Refinement(
            frozenset(moved),
            [(piece, before_numbers[piece.kind]) for piece in cut.gone],
            [(piece, self.numbers[piece.kind]) for piece in cut.new],
            frozenset(before_numbers.values()),
            frozenset(self.numbers[kind] for kind in fresh),
        )
        for kind in old:
            if not self._uses[kind]:
                number = self.numbers.pop(kind)
                del self.kinds[number], self._uses[kind]
                self.classes_of.remove(kind, number)
        return found

    def _number(self, kinds: Iterable[AddressClass]) -> None:
        """Give numbers to new classes."""
        texts = {class_text(kind): kind for kind in kinds}
        for text, number in class_numbers(texts, self.kinds).items():
            kind = texts[text]
            self.numbers[kind], self.kinds[number] = number, kind
            self.classes_of.add(kind, number)


class ClassIndex:
    """The numbers of classes by the conditions of rules."""

    def __init__(self, numbers: Mapping[AddressClass, int]) -> None:
        self._instances: dict[tuple[Conditions, str | None], set[int]] = defaultdict(set)
        self._shared: dict[Conditions, set[int]] = defaultdict(set)
        self._within: dict[Range, set[int]] = defaultdict(set)
        for kind, number in numbers.items():
            self.add(kind, number)

    def add(self, kind: AddressClass, number: int) -> None:
        """Add a class."""
        for some in self._places(kind):
            some.add(number)

    def remove(self, kind: AddressClass, number: int) -> None:
        """Remove a class."""
        for some in self._places(kind):
            some.discard(number)

    def _places(self, kind: AddressClass) -> Iterator[set[int]]:
        for selector in (EVERY_INSTANCE, *kind.selectors) if kind.selectors is not None else ():
            yield self._instances[selector, None]
            yield self._instances[selector, kind.network]
        for selector in (EVERY_INSTANCE, *kind.shared) if kind.shared is not None else ():
            yield self._shared[selector]
        for range_ in kind.ranges:
            yield self._within[range_]

    def shared(self, selector: Conditions) -> Iterable[int]:
        """Return the classes of addresses that several instances may use, one of which a selector selects."""
        return self._shared.get(selector, ())

    def of(self, selector: Conditions, network: str | None = None) -> Iterable[int]:
        """Return the classes of the instances that a selector selects."""
        return self._instances.get((selector, network), ())

    def within(self, range_: Range) -> Iterable[int]:
        """Return the classes of the addresses in a range."""
        return self._within.get(range_, ())
