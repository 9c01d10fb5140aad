"""The packet classes of one run: every source by every destination by every service, of one version of IP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from insula.network.interpreter.values import Symbolic

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
BITS: Final = {4: 32, 6: 128}
ECHO: Final = {4: 8, 6: 128}
"""The ICMP type of an echo request."""


class NumberRange(NamedTuple):
    """All numbers from `low` to `high`: addresses, ports, or types."""

    low: int
    high: int


class Service(NamedTuple):
    """Packets of some IP protocols; TCP and UDP by ports, ICMP by type and code, others without parts. In a space it
    may stand for others that are `alike`: no rule tells them apart."""

    protocol: NumberRange
    source: NumberRange | None = None
    target: NumberRange | None = None  # port, or ICMP type
    code: NumberRange | None = None
    alike: tuple[Service, ...] = ()

    @property
    def has_ports(self) -> bool:
        return self.protocol in ((TCP, TCP), (UDP, UDP))

    @property
    def is_icmp(self) -> bool:
        return self.protocol in ((ICMP, ICMP), (ICMPV6, ICMPV6))


class Cuts:
    """The boundaries at which numbers below 2 ** `bits` are divided: a boundary is the first number of an atom."""

    def __init__(self, bits: int) -> None:
        self._end = 1 << bits
        self._at = {0}

    def add(self, low: int, high: int) -> None:
        """Have no atom cross the borders of this range."""
        if low < self._end:
            self._at.add(low)
        if high + 1 < self._end:
            self._at.add(high + 1)

    def __len__(self) -> int:
        return len(self._at)

    def include(self, other: Cuts) -> None:
        """Add all boundaries of another."""
        self._at |= other._at

    def atoms(self) -> list[NumberRange]:
        starts = sorted(self._at)
        ends = [*(start - 1 for start in starts[1:]), self._end - 1]
        return [NumberRange(*each) for each in zip(starts, ends, strict=True)]


class Boundaries:
    """All boundaries that rules and intents have, of one version of IP."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.addresses = Cuts(BITS[version])
        self.protocols = Cuts(8)
        for known in (TCP, UDP, ICMP, ICMPV6):
            self.protocols.add(known, known)
        self.sources = {TCP: Cuts(16), UDP: Cuts(16)}  # ports by protocol
        self.targets = {TCP: Cuts(16), UDP: Cuts(16)}
        self.types, self.codes = Cuts(8), Cuts(8)
        self.types.add(ECHO[version], ECHO[version])
        self.tells: list[Callable[[Sequence[Service]], Iterable[int]]] = []
        """Functions that return sets of services, as bits: those that a model tells from others."""

    def include(self, other: Boundaries) -> None:
        """Add all boundaries of another, of the same version."""
        for mine, theirs in zip(self._cuts(), other._cuts(), strict=True):
            mine.include(theirs)

    def count(self) -> int:
        """Return how many boundaries there are."""
        return sum(map(len, self._cuts()))

    def _cuts(self) -> list[Cuts]:
        ports = [*self.sources.values(), *self.targets.values()]
        return [self.addresses, self.protocols, *ports, self.types, self.codes]

    def services(self) -> list[Service]:
        found = []
        icmp = ICMP if self.version == 4 else ICMPV6
        for protocol in self.protocols.atoms():
            number = protocol.low
            if number in (TCP, UDP) and protocol.low == protocol.high:
                for source in self.sources[number].atoms():
                    found += [Service(protocol, source, target) for target in self.targets[number].atoms()]
            elif protocol == (icmp, icmp):
                found += [Service(protocol, None, t, c) for t in self.types.atoms() for c in self.codes.atoms()]
            else:
                found.append(Service(protocol))
        return found


MakeBoundaries = Callable[[], Mapping[int, Boundaries]]
"""Returns boundaries by version of IP, when they are needed."""


class Space:
    """The classes (source, destination, service), each with a number: the bits of an int are a set of classes."""

    def __init__(self, sources: int, targets: Sequence[NumberRange], services: Sequence[Service]) -> None:
        self.sources = sources
        self.targets = targets
        self.services = services
        self._service, self._row = len(services), len(services) * len(targets)
        self.all = (1 << self._row * sources) - 1
        self._each_row = _repeated(1, self._row, sources)
        self._first_target = ((1 << self._service) - 1) * self._each_row
        self._each_cell = _repeated(1, self._service, sources * len(targets))

    def of_source(self, number: int) -> int:
        return ((1 << self._row) - 1) << number * self._row

    def of_target(self, number: int) -> int:
        return self._first_target << number * self._service

    def of_services(self, bits: int) -> int:
        """Return the classes with the services in `bits`, from every source to every destination."""
        return bits * self._each_cell

    def cell(self, source: int, target: int) -> int:
        """Return where the bits of the services from `source` to `target` begin."""
        return source * self._row + target * self._service

    def row_cells(self) -> range:
        """Return where the bits of the services from the first source to each target begin."""
        return range(0, self._row, self._service)

    def row(self, bits: int, source: int) -> int:
        """Return the classes of one source, as those of a space with that source only."""
        return bits >> source * self._row & (1 << self._row) - 1

    def services_of(self, bits: int, source: int, target: int) -> int:
        return bits >> self.cell(source, target) & (1 << self._service) - 1

    def classes(self, bits: int) -> Iterator[tuple[int, int, int]]:
        """Yield (source, target, service) of the classes in `bits`."""
        while bits:
            number = (bits & -bits).bit_length() - 1
            bits &= bits - 1
            source, rest = divmod(number, self._row)
            yield source, *divmod(rest, self._service)

    def part(self, bits: int) -> Space:
        """Return the space of the destinations and services that occur in these classes, with one source."""
        targets, services = [], 0
        for number, each in enumerate(self.targets):
            found = 0
            for source in range(self.sources):
                found |= self.services_of(bits, source, number)
            if found:
                targets.append(each)
            services |= found
        return Space(1, targets, [each for n, each in enumerate(self.services) if services >> n & 1])

    # -- fields --------------------------------------------------------------------------------------------------

    def by_source(self, length: int, values: Iterable[NumberRange | None]) -> Symbolic:
        """Return a field whose value depends on the source; None is an unknown value."""
        parts, unknown = [], 0
        for number, value in enumerate(values):
            if value is None:
                unknown |= self.of_source(number)
            else:
                parts.append((*value, self.of_source(number)))
        return Symbolic(length, parts, unknown)

    def by_target(self, length: int) -> Symbolic:
        return Symbolic(length, [(*each, self.of_target(number)) for number, each in enumerate(self.targets)])

    def by_service(self, length: int, values: Iterable[NumberRange | None]) -> Symbolic:
        """Return a field whose value depends on the service; None is an unknown value."""
        known: dict[NumberRange, int] = {}
        unknown = 0
        for number, value in enumerate(values):
            if value is None:
                unknown |= 1 << number
            else:
                known[value] = known.get(value, 0) | 1 << number
        parts = [(*value, self.of_services(bits)) for value, bits in known.items()]
        return Symbolic(length, parts, self.of_services(unknown))


@functools.lru_cache(maxsize=64)
def _repeated(bits: int, width: int, times: int) -> int:
    """Return `bits` at every multiple of `width` below `times` multiples."""
    found, have = 0, 0
    if times == 0:
        return 0
    found, have = bits, 1
    while have < times:  # doubled, which is faster than one by one
        more = min(have, times - have)
        found |= (found & (1 << width * more) - 1) << width * have
        have += more
    return found
