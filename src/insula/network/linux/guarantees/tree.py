"""The tree of HTB classes for one direction, as data.

    1:1                 all tenants of this host: 95 % of the link, so that packets wait here and not in a switch
      1:(10 + tenant)   a tenant: its floor is the rate of the class, and it borrows up to its ceiling
        1:(4000 + tenant)   what is of no instance with a floor
        1:(8000 + number)   an instance with a floor
        1:(f600 + number)   what it sends to a host that is overloaded (destinations.py)

Numbers are hexadecimal. A tenant's class always has a class below it: a leaf that becomes an inner class would lose
its packets. Classes share what nobody needs in proportion to their quanta, which are set in proportion to the floors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from insula.kernel.netlink.traffic_control import HtbClass, handle, same_class
from insula.model.guarantees import Rate, Shaping

USABLE: Final = 0.95
"""The part of a link that is given to tenants."""
UNLIMITED: Final = 400_000_000_000
"""The rate of the root where there are only ceilings, in bits a second."""
LEAST: Final = 8_000
"""The rate of a class without a floor: HTB allows none of 0."""
_ROOT, _TENANTS, _RESTS, _INSTANCES, _DESTINATIONS = 1, 0x10, 0x4000, 0x8000, 0xF600
MAX_DESTINATIONS: Final = 0xFFFE - _DESTINATIONS
"""How many ceilings for destinations a host may have at a time."""
_FULL = 250_000  # bytes of a quantum for the whole link
_FRAME = 1_600  # bytes: more than a packet of 1,500 with its header
_SEGMENTS = 65_536  # bytes that a TCP sender hands over as one packet (GSO)
_FAST = 1_000_000_000  # bits a second from which packets are that large
_WEIGHT = 0.01  # of the link: how a class without a floor shares what nobody needs
_BURST = 0.002  # seconds at the rate
_MOST_BURST = 0.010  # seconds, for slow classes
_QUEUE = 0.010  # seconds at the ceiling that packets may wait
_LEAST_QUEUE = 2 * _SEGMENTS


def root() -> int:
    return handle(1, _ROOT)


def tenant(index: int) -> int:
    """Return the class of a tenant by its index."""
    return handle(1, _TENANTS + index)


def tenant_index(number: int) -> int | None:
    """Return the index of the tenant whose class this is; None for other classes."""
    minor = number & 0xFFFF
    return minor - _TENANTS if _TENANTS <= minor < _RESTS else None


def rest(index: int) -> int:
    """Return the class of a tenant's packets that belong to no instance with a floor."""
    return handle(1, _RESTS + index)


def instance(number: int) -> int:
    """Return the class of an instance, by the number of its guarantee."""
    return handle(1, _INSTANCES + number)


def is_instance(number: int) -> bool:
    """Return whether this is the class of an instance."""
    return _INSTANCES <= number & 0xFFFF < _DESTINATIONS


def destination(number: int) -> int:
    """Return the class of what a tenant sends to one other host, by the number of this pair."""
    return handle(1, _DESTINATIONS + number)


def is_destination(number: int) -> bool:
    """Return whether this is the class of a destination."""
    return number & 0xFFFF >= _DESTINATIONS


def destination_class(number: int, index: int, ceiling: int, shaping: Shaping) -> HtbClass:
    """Return the class of a destination below that of the tenant with this index. It has no floor of its own."""
    capacity = UNLIMITED if shaping.link is None else usable(shaping.link)
    return htb_class(destination(number), tenant(index), LEAST, min(ceiling, capacity), capacity)


def usable(link: int) -> int:
    """Return how many bits a second of a link tenants share."""
    return int(link * USABLE)


def root_class(link: int | None) -> HtbClass:
    """Return the class of all tenants."""
    rate = UNLIMITED if link is None else usable(link)
    return _inner(htb_class(root(), handle(1), rate, rate, rate))


def tenant_classes(index: int, shaping: Shaping, direction: str) -> dict[int, HtbClass]:
    """Return a tenant's classes for a direction, "out" or "in", by number; parents come first."""
    capacity = UNLIMITED if shaping.link is None else usable(shaping.link)
    own = rate_of(shaping, direction)
    ceiling = min(own.ceiling or capacity, capacity)
    floor = min(own.floor or LEAST, ceiling)
    floors = {
        number: min(rate.floor, ceiling)
        for number, rate in instances(shaping, direction).items()
        if rate.floor is not None
    }
    found = [
        _inner(htb_class(tenant(index), root(), floor, ceiling, capacity)),
        htb_class(rest(index), tenant(index), max(floor - sum(floors.values()), LEAST), ceiling, capacity),
    ]
    found += [
        htb_class(instance(number), tenant(index), rate, ceiling, capacity) for number, rate in sorted(floors.items())
    ]
    return {each.number: each for each in found}


def rate_of(shaping: Shaping, direction: str) -> Rate:
    return shaping.out if direction == "out" else shaping.in_


def instances(shaping: Shaping, direction: str) -> dict[int, Rate]:
    """Return the rates of instances by the numbers of their guarantees."""
    return {each.number: each.out if direction == "out" else each.in_ for each in shaping.ports.values()}


def htb_class(number: int, parent: int, floor: int, ceiling: int, capacity: int) -> HtbClass:
    """Return a class with bursts and a quantum that suit its rates. `capacity` is the rate of the root."""
    least = _SEGMENTS if capacity >= _FAST else _FRAME
    share = max(floor / capacity, _WEIGHT)
    full = _FULL if capacity < _FAST else _FULL * 16
    return HtbClass(number, parent, floor, ceiling, burst(floor), burst(ceiling), max(int(full * share), least))


def _inner(each: HtbClass) -> HtbClass:
    """Return a class that has classes below it. The kernel doesn't use its quantum, and doesn't change it later."""
    return replace(each, quantum=_FULL)


def burst(rate: int) -> int:
    """Return the bytes that a class may send at once: 2 ms at its rate, but what TCP hands over as one packet if that
    isn't too much for the rate (10 ms)."""
    return max(int(rate / 8 * _BURST), min(_SEGMENTS, int(rate / 8 * _MOST_BURST)), 2 * _FRAME)


def queue(ceiling: int) -> int:
    """Return the bytes that may wait in a class's queue."""
    return max(int(ceiling / 8 * _QUEUE), _LEAST_QUEUE) if ceiling < UNLIMITED else 16 << 20


def changed(wanted: Mapping[int, HtbClass], have: Mapping[int, HtbClass]) -> list[HtbClass]:
    """Return the wanted classes that are missing or different, in the order of `wanted`."""
    return [each for each in wanted.values() if each.number not in have or not same_class(each, have[each.number])]
