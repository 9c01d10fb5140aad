"""The reference model of queues: the floor and the ceiling that tenants' packets should have."""

from __future__ import annotations

from typing import Final, NamedTuple

from insula.network.intent import TenantIntent

DIRECTIONS: Final = ("out", "in")
_PART: Final = 0.95
"""The part of a link that tenants have."""


class WantedRates(NamedTuple):
    """Bits a second; None promises nothing."""

    floor: int | None
    ceiling: int | None


def floors(intent: TenantIntent, direction: str) -> dict[int, WantedRates]:
    """Return what the packets of each instance with a floor should have in a direction, by the number of its guarantee:
    the floor, and the ceiling of the tenant."""
    whole = rates(intent, direction)
    if whole is None or intent.shaping is None:
        return {}
    found = {}
    for each in intent.shaping.ports.values():
        own = (each.out if direction == "out" else each.in_).floor
        if own is not None:
            found[each.number] = WantedRates(own if whole.ceiling is None else min(own, whole.ceiling), whole.ceiling)
    return found


def guaranteed(intent: TenantIntent) -> list[int]:
    """Return the numbers of the guarantees of instances with a floor."""
    return sorted({number for direction in DIRECTIONS for number in floors(intent, direction)})


def rates(intent: TenantIntent, direction: str) -> WantedRates | None:
    """Return what the packets of a tenant should have in a direction; None if they need no class."""
    shaping = intent.shaping
    if shaping is None:
        return None
    own = shaping.out if direction == "out" else shaping.in_
    link = None if shaping.link is None else int(shaping.link * _PART)
    ceiling = own.ceiling if link is None else min(own.ceiling or link, link)
    floor = own.floor if own.floor is None or ceiling is None else min(own.floor, ceiling)
    return WantedRates(floor, ceiling)
