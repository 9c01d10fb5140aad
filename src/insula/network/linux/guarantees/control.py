"""The loop that limits senders which overload a receiver: floors at the receiving end of the overlay.

A host shapes what arrives only after it has passed the link. Senders that slow down when packets are lost (TCP) soon
send what they get. Others don't, and fill the link before the receiver's tree: what they send has to be limited where
it is sent from, which is a host of Insula as well. `decide` is the whole decision: it gets what senders have offered in
the last period, and returns the ceilings for the next one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Final, NamedTuple, TypeVar

from insula.kernel.netlink.traffic_control import ClassCounters

K = TypeVar("K", bound=Hashable)
USABLE: Final = 0.95
"""The part of a receiver's link that is shared."""
BUSY: Final = 0.98
"""The part of that from which the receiver counts as overloaded."""
LEAST: Final = 1_000_000
"""The least ceiling in bits a second: a flow that gets less could not show that it needs more."""


class OverlayFlow(NamedTuple):
    """What a tenant sends from one host to another."""

    tenant: str
    sender: str
    receiver: str


class ReceivingHost(NamedTuple):
    """A receiving host: its link in bits a second, and the floors of tenants for what they receive there."""

    link: int
    floors: Mapping[str, int]


def offered_by(before: ClassCounters, after: ClassCounters, seconds: float) -> int:
    """Return the bits a second that a class was given between two readings of its counters."""
    sent, packets = after.bytes - before.bytes, after.packets - before.packets
    dropped = (after.drops - before.drops) * (sent / packets if packets else 1_500)
    return int((sent + dropped + max(after.backlog - before.backlog, 0)) * 8 / seconds)


def decide(
    caps: Mapping[OverlayFlow, int], offered: Mapping[OverlayFlow, int], receivers: Mapping[str, ReceivingHost]
) -> dict[OverlayFlow, int]:
    """Return the ceilings of flows for the next period; a flow that is not in it has none.

    `caps` are those of now. `offered` is what was to be sent in the last period, in bits a second: what was sent, and
    what was dropped at the sender (`offered_by`). Flows to a receiver that is not overloaded get twice their ceiling,
    until that is as much as the link.
    """
    found: dict[OverlayFlow, int] = {}
    for name, receiver in receivers.items():
        usable = int(receiver.link * USABLE)
        flows = {flow: rate for flow, rate in offered.items() if flow.receiver == name and rate > 0}
        if sum(flows.values()) > usable * BUSY:
            found |= _fair(flows, usable, receiver.floors)
        else:
            grown = {flow: 2 * cap for flow, cap in caps.items() if flow.receiver == name}
            found |= {flow: cap for flow, cap in grown.items() if cap < usable}
    return found


def _fair(flows: Mapping[OverlayFlow, int], usable: int, floors: Mapping[str, int]) -> dict[OverlayFlow, int]:
    """Return ceilings for flows that together offer more than is usable. Those of tenants that need less than their
    share are left out: they slow down nobody."""
    demands: dict[str, int] = {}
    for flow, rate in flows.items():
        demands[flow.tenant] = demands.get(flow.tenant, 0) + rate
    # a tenant below its floor may have sent little because of the overload: it gets room to grow
    wanted = {tenant: min(2 * demand, max(floors.get(tenant, 0), demand)) for tenant, demand in demands.items()}
    shares = share(wanted, usable, floors)
    found = dict[OverlayFlow, int]()
    for tenant, demand in demands.items():
        if demand > shares[tenant]:
            mine = {flow: rate for flow, rate in flows.items() if flow.tenant == tenant}
            filled = _filled({flow: (rate, 1.0) for flow, rate in mine.items()}, shares[tenant])
            found |= {flow: max(cap, LEAST) for flow, cap in filled.items()}
    return found


def share(demands: Mapping[str, int], usable: int, floors: Mapping[str, int]) -> dict[str, int]:
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
