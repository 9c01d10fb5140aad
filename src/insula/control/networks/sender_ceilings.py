"""What the senders of an overloaded host may send to it: the decision, without any input or output.

A host shapes what arrives only after it has passed the link. Senders that slow down when packets are lost (TCP with
CUBIC or Reno) soon send what they get. Others don't, and fill the link before the receiver's tree: they have to be
limited where they send from, at a host of the same cloud.

A ceiling is one number for a tenant, and holds for each host that sends to it: the receiver doesn't know how many do.
What arrives tells whether the number was right, as in RCP (Dukkipati, 2008) and EyeQ (Jeyakumar and others, 2013): the
ceiling is multiplied by what the tenant should get, and divided by what it got.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Final, TypeVar

from insula.network.fabric import Arrivals, Arrived

K = TypeVar("K", bound=Hashable)
USABLE: Final = 0.95
"""The part of a link that is shared."""
OVERLOAD: Final = 1.02
"""How many times that has to arrive in an overload: TCP, too, sends a little more than it gets."""
LEAST: Final = 1_000_000
"""The least ceiling in bits a second: a flow that gets less could not show that it needs more."""
_LESS = 0.8  # times the last ceiling, at most, if that was too much
_STEP = 8  # the most by which a ceiling is divided at once
_PART = 16  # of the tenant's share: no ceiling is less, however many hosts send


def rates(before: Arrivals, after: Arrivals, seconds: float) -> dict[int, int]:
    """Return the bits a second that arrived for each tenant, those that were dropped here included."""
    nothing = Arrived(0, 0, 0, 0)
    found = {}
    for tenant, now in after.tenants.items():
        was = before.tenants.get(tenant, nothing)
        if now.bytes < was.bytes or now.drops < was.drops:
            was = nothing  # its classes are new
        got, packets = now.bytes - was.bytes, now.packets - was.packets
        dropped = (now.drops - was.drops) * (got / packets if packets else 1_500)
        found[tenant] = int((got + dropped + max(now.backlog - was.backlog, 0)) * 8 / seconds)
    return found


def is_overloaded(arrived: Mapping[int, int], link: int) -> bool:
    """Whether more arrives than there is to share."""
    return sum(arrived.values()) > link * USABLE * OVERLOAD


def decide(
    ceilings: Mapping[int, int], arrived: Mapping[int, int], floors: Mapping[int, int], link: int
) -> dict[int, int]:
    """Return the ceilings of tenants for the next period, in bits a second for each sending host. A tenant that is not
    in it has none. `ceilings` are those of the last period, and `arrived` is what came then."""
    usable = int(link * USABLE)
    if is_overloaded(arrived, link):
        found = _lowered(ceilings, arrived, floors, usable)
    else:
        found = _raised(ceilings, arrived, usable)
    return {tenant: min(max(each, LEAST), usable) for tenant, each in found.items()}


def _raised(ceilings: Mapping[int, int], arrived: Mapping[int, int], usable: int) -> dict[int, int]:
    """Return ceilings by which what is unused is used. Those of tenants that send much less than they may go soon."""
    growth = min(2.0, max(1.0, usable / max(sum(arrived.values()), 1)))
    found = {}
    for tenant, ceiling in ceilings.items():
        if arrived.get(tenant, 0) >= ceiling / 2:
            found[tenant] = int(ceiling * growth)
        elif 2 * ceiling < usable:
            found[tenant] = 2 * ceiling
    return found


def _lowered(
    ceilings: Mapping[int, int], arrived: Mapping[int, int], floors: Mapping[int, int], usable: int
) -> dict[int, int]:
    """Return ceilings that end an overload. Tenants that need less than their share get none: they slow down nobody."""
    wanted = {}
    for tenant, rate in arrived.items():
        # a tenant below its floor may have sent little because of the overload. What it doesn't use is given back soon
        wanted[tenant] = max(floors.get(tenant, 0), rate) if rate else 0
        if tenant in ceilings:
            wanted[tenant] = usable  # how much more it would send isn't known
    shares = share(wanted, usable, floors)
    found = dict(ceilings)
    for tenant, rate in arrived.items():
        if tenant in ceilings and rate:
            right = int(ceilings[tenant] * min(shares[tenant] / rate, 2.0))
            if rate > shares[tenant]:  # more may have been sent than the link has let through
                right = min(right, int(ceilings[tenant] * _LESS))
            least = max(ceilings[tenant] // _STEP, shares[tenant] // _PART)
            found[tenant] = max(right, least)
        elif rate > shares[tenant]:
            found[tenant] = shares[tenant]
    return found


def share(demands: Mapping[int, int], usable: int, floors: Mapping[int, int]) -> dict[int, int]:
    """Share a link among tenants: each gets its floor if it needs that, and the rest in proportion to the floors."""
    total = sum(floors.get(tenant, 0) for tenant in demands)
    scale = min(1.0, usable / total) if total else 1.0
    base = {tenant: min(demand, int(floors.get(tenant, 0) * scale)) for tenant, demand in demands.items()}
    least = usable / 100  # the weight of a tenant without a floor
    rest = {tenant: (demands[tenant] - base[tenant], max(floors.get(tenant, 0), least)) for tenant in demands}
    more = _filled(rest, max(usable - sum(base.values()), 0))
    return {tenant: base[tenant] + more[tenant] for tenant in demands}


def _filled(wanted: Mapping[K, tuple[int, float]], amount: int) -> dict[K, int]:
    """Fill demands, each (demand, weight), in proportion to the weights until the amount is used up (max-min)."""
    found = dict.fromkeys(wanted, 0)
    open_, left = [*wanted], float(amount)
    while open_:
        level = left / sum(wanted[each][1] for each in open_)
        full = [each for each in open_ if wanted[each][0] <= level * wanted[each][1]]
        for each in full:
            found[each] = wanted[each][0]
            left -= found[each]
        open_ = [each for each in open_ if each not in full]
        if not full:
            found |= {each: int(level * wanted[each][1]) for each in open_}
            break
    return found
