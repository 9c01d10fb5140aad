"""The part of the reference model about addresses that are outside of this host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from insula.network.interpreter.space import Boundaries, NumberRange, Space
from insula.network.ranges import overlap, range_of

_SPECIAL: Final = {  # never outside: this network, loopback, link-local, multicast and reserved (RFC 6890)
    4: ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"),
    6: ("::/8", "fe80::/9", "ff00::/8"),
}
_GROUPS: Final = {4: ("224.0.0.0/4", "255.255.255.255/32"), 6: ("ff00::/8",)}
_CLOSED: Final = {
    4: ("168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32", "192.0.2.0/24"),
    6: ("fd00:ec2::/32", "fd20:ce::254/128", "2001:db8::/32"),
}


def is_group(version: int, range_: NumberRange) -> bool:
    """Whether some of these addresses are multicast, or the broadcast address of every network."""
    return any(overlap(range_of(each), range_) for each in _GROUPS[version])


class Outside:
    """The addresses that are outside of this host. `reserved` are ranges of the fabric in CIDR notation."""

    def __init__(self, version: int, reserved: Iterable[str]) -> None:
        self.version = version
        self._reserved = [range_of(each) for each in reserved if (":" in each) == (version == 6)]
        self._inner = [*self._reserved, *(range_of(each) for each in _SPECIAL[version])]
        self._closed = [range_of(each) for each in _CLOSED[version]]
        self._groups = [range_of(each) for each in _GROUPS[version]]

    def cut(self, into: Boundaries) -> None:
        """Add the boundaries of these ranges."""
        for each in (*self._inner, *self._closed, *self._groups):
            into.addresses.add(*each)

    def has(self, range_: NumberRange) -> bool:
        """Whether all of these addresses are outside."""
        return not any(overlap(each, range_) for each in self._inner)

    def is_special(self, range_: NumberRange) -> bool:
        """Whether some of these addresses are none of a station's, or of one that is near."""
        return any(overlap(each, range_) for each in self._inner)

    def is_reserved(self, range_: NumberRange) -> bool:
        """Whether some of these addresses belong to the fabric."""
        return any(overlap(each, range_) for each in self._reserved)

    def may_be_closed(self, range_: NumberRange) -> bool:
        """Whether the operator of a host may keep tenants from some of these addresses: services of a cloud that give
        secrets to its machines, the host's own addresses, and documentation."""
        return any(overlap(each, range_) for each in self._closed)

    def without_promise(self, space: Space, more: Sequence[NumberRange] = ()) -> int:
        """Return the classes whose destination is multicast or broadcast."""
        found = 0
        for number, range_ in enumerate(space.targets):
            if any(overlap(each, range_) for each in (*self._groups, *more)):
                found |= space.of_target(number)
        return found
