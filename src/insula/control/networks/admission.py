"""The admission of floors: what is promised is never more than what there is.

The floors of all tenants of a host together fit into the host, and those of a tenant's instances into the floors of the
tenant. A refusal tells what is left.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from insula.model.errors import Conflict, Invalid
from insula.model.guarantees import FLOORS, Guarantee
from insula.model.objects import Limits
from insula.model.units import format_rate, format_size
from insula.network import link

LINK = 0.95
"""The part of the link that may be promised. The rest is the host's own, and keeps queues on this host."""
CPUS = 0.95
"""The part of the processors that may be promised."""
MEMORY = 0.8
"""The part of the memory that may be promised. The kernel and the host's services need the rest."""
MOST_INSTANCES, MOST_FLOORS = 1_000, 256
"""How many instances of a tenant may have a guarantee, and of these a floor of bandwidth."""
_ROUNDING = 1e-9  # sums of fractions of a CPU are not exact
_NAMES = {
    "floor_out": "sent bandwidth",
    "floor_in": "received bandwidth",
    "cpus": "CPUs",
    "memory": "memory",
}
_OPTIONS = {"floor_out": "--out", "floor_in": "--in", "cpus": "--cpu", "memory": "--memory"}
_LIMITS = {"floor_out": "bandwidth", "floor_in": "bandwidth", "cpus": "cpus", "memory": "memory"}


@dataclass(frozen=True)
class Capacity:
    """What a host has: `link` in bits a second in each direction, None if it isn't known."""

    link: int | None
    cpus: int
    memory: int

    def promisable(self, field: str) -> float | None:
        """How much of it may be promised to tenants together; None if that isn't known."""
        if field in ("floor_out", "floor_in"):
            return None if self.link is None else int(self.link * LINK)
        return self.cpus * CPUS if field == "cpus" else int(self.memory * MEMORY)


def measured_capacity(configured: int | None) -> Capacity:
    """What this host has; `configured` is the configured bandwidth, None has it measured. Blocks."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Capacity(configured or link.measured_link(), len(os.sched_getaffinity(0)), memory)


def check_admitted(wanted: Guarantee, others: Iterable[Guarantee], limits: Limits, capacity: Capacity) -> None:
    """Check a guarantee against `others`, all that there are without it. Conflict, Invalid."""
    _check_ceilings(wanted, limits)
    every = list(others)
    if wanted.instance is None:
        _check_host(wanted, [each for each in every if each.instance is None], capacity)
        _check_instances(wanted, [each for each in every if each.tenant == wanted.tenant])
    else:
        _check_tenant(wanted, [each for each in every if each.tenant == wanted.tenant])


def _check_ceilings(wanted: Guarantee, limits: Limits) -> None:
    for direction in ("out", "in"):
        floor, ceiling = getattr(wanted, f"floor_{direction}"), getattr(wanted, f"ceiling_{direction}")
        if floor is not None and ceiling is not None and floor > ceiling:
            what = f"a floor of {format_rate(floor)} is above the ceiling of {format_rate(ceiling)}"
            raise Invalid(what, f"set --{direction} and --ceil-{direction} so that the ceiling is not lower")
    for field in FLOORS:
        floor, limit = getattr(wanted, field), getattr(limits, _LIMITS[field])
        if floor is not None and limit is not None and floor > limit:
            what = f"tenant {wanted.tenant} is limited to {_amount(field, limit)}"
            raise Conflict(what, f"`insula tenant update {wanted.tenant} --{_LIMITS[field]}` changes that")


def _check_host(wanted: Guarantee, others: Iterable[Guarantee], capacity: Capacity) -> None:
    """Check that the floors of tenants fit into the host."""
    taken = list(others)
    for field in FLOORS:
        if (floor := getattr(wanted, field)) is None:
            continue
        whole = capacity.promisable(field)
        if whole is None:
            what = "this host's link has no known speed, so no bandwidth can be promised"
            raise Conflict(what, f"{link.HINT}; ceilings (--ceil-out, --ceil-in) work without")
        left = whole - _sum(taken, field)
        if floor > left + _ROUNDING:
            what = f"{_amount(field, floor)} can't be promised: {_shown(field, max(left, 0))} is left"
            raise Conflict(what, f"this host can promise {_shown(field, whole)} to all tenants together")


def _check_instances(wanted: Guarantee, own: Iterable[Guarantee]) -> None:
    """Check that the floors of the tenant's instances still fit into those of the tenant."""
    instances = [each for each in own if each.instance is not None]
    for field in FLOORS:
        promised = _sum(instances, field)
        if promised > (getattr(wanted, field) or 0) + _ROUNDING:
            what = f"instances of tenant {wanted.tenant} have {_amount(field, promised)} as floors"
            raise Conflict(what, f"lower {_OPTIONS[field]} of theirs first")


def _check_tenant(wanted: Guarantee, own: Iterable[Guarantee]) -> None:
    """Check that the floors of instances fit into those of their tenant."""
    every = list(own)
    whole = next((each for each in every if each.instance is None), None)
    instances = [each for each in every if each.instance is not None]
    _check_number(wanted, instances)
    for field in FLOORS:
        if (floor := getattr(wanted, field)) is None:
            continue
        of_tenant = (getattr(whole, field) if whole else None) or 0
        left = of_tenant - _sum(instances, field)
        if floor > left + _ROUNDING:
            what = f"{_amount(field, floor)} can't be promised: {_shown(field, max(left, 0))} is left"
            hint = f"of the tenant's floor of {_shown(field, of_tenant)}"
            raise Conflict(what, hint if of_tenant else "the tenant has no such floor; an operator can set one")


def _check_number(wanted: Guarantee, instances: Sequence[Guarantee]) -> None:
    """Check that the tenant has not too many guarantees: each with a floor is compared with every packet."""
    if len(instances) >= MOST_INSTANCES:
        raise Conflict(f"{MOST_INSTANCES} instances of tenant {wanted.tenant} have guarantees", "clear some of these")
    with_floors = [each for each in instances if each.floor_out is not None or each.floor_in is not None]
    if (wanted.floor_out is not None or wanted.floor_in is not None) and len(with_floors) >= MOST_FLOORS:
        what = f"{MOST_FLOORS} instances of tenant {wanted.tenant} have floors of bandwidth"
        raise Conflict(what, "set those of the tenant as a whole instead")


def _sum(guarantees: Iterable[Guarantee], field: str) -> float:
    return sum(getattr(each, field) or 0 for each in guarantees)


def _amount(field: str, value: float) -> str:
    """The value with what it is of."""
    return f"{_shown(field, value)} {'' if field == 'cpus' else 'of '}{_NAMES[field]}"


def _shown(field: str, value: float) -> str:
    if field == "cpus":
        return f"{value:.10g}"
    return format_size(int(value)) if field == "memory" else format_rate(int(value))
