"""Pure functions on meters. Each returns a new meter, and may be called again with the same reading."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from msgspec.structs import asdict, replace

from insula.model.accounting import (
    Account,
    Ledger,
    MemoryMeter,
    ReservedTotals,
    TrafficMeters,
    TrafficTotals,
    UsageMeter,
    UsedTotals,
)
from insula.network.fabric import Traffic

S = TypeVar("S", UsedTotals, ReservedTotals, TrafficTotals)
INTERVAL: Final = 10.0
"""Seconds between two readings."""
LONGEST: Final = 2.5 * INTERVAL
"""Seconds between two samples of memory over which they are joined; a longer gap is counted as not sampled."""
_NO_TRAFFIC = TrafficMeters()


def advance(meter: UsageMeter, incarnation: str, raw: int) -> UsageMeter:
    """Take a reading of a counter. A new incarnation has counted from 0."""
    before = meter.raw if incarnation == meter.incarnation else 0
    return UsageMeter(incarnation=incarnation, raw=max(raw, before), total=meter.total + max(0, raw - before))


def advance_port(account: Account, interface: str, traffic: Traffic) -> Account:
    """Take a reading of the counters of one port."""
    meters = advance_traffic(account.ports.get(interface, _NO_TRAFFIC), traffic)
    return replace(account, ports={**account.ports, interface: meters})


def advance_traffic(meters: TrafficMeters, traffic: Traffic) -> TrafficMeters:
    """Take a reading of the four counters of traffic."""
    received, sent = traffic
    return replace(
        meters,
        received=advance(meters.received, received.incarnation, received.bytes),
        received_packets=advance(meters.received_packets, received.incarnation, received.packets),
        sent=advance(meters.sent, sent.incarnation, sent.bytes),
        sent_packets=advance(meters.sent_packets, sent.incarnation, sent.packets),
    )


def baseline(incarnation: str, raw: int) -> UsageMeter:
    """A meter that counts from this reading on."""
    return UsageMeter(incarnation=incarnation, raw=raw)


def hold(meter: MemoryMeter, until: float) -> MemoryMeter:
    """Extend the last sample to the time `until`, at which it was still right."""
    if meter.over or until <= meter.at:
        return meter
    seconds = until - meter.at
    return replace(meter, at=until, total=meter.total + meter.used * seconds, sampled=meter.sampled + seconds)


def sample(meter: MemoryMeter, incarnation: str, at: float, used: int, ran: float) -> MemoryMeter:
    """Take a sample. `ran` are the seconds since the start, which counts if this is the first one after it."""
    if incarnation != meter.incarnation:
        unsampled = meter.unsampled + max(0.0, ran)
        return replace(meter, incarnation=incarnation, at=at, used=used, over=False, unsampled=unsampled)
    if meter.over:
        return meter
    seconds = max(0.0, at - meter.at)
    if seconds > LONGEST:
        return replace(meter, at=at, used=used, unsampled=meter.unsampled + seconds)
    total = meter.total + (meter.used + used) / 2 * seconds
    return replace(meter, at=at, used=used, total=total, sampled=meter.sampled + seconds)


def finish(meter: MemoryMeter, incarnation: str, at: float, ran: float) -> MemoryMeter:
    """End an incarnation: the time since its last sample, or all that it `ran` without one, was not sampled."""
    if incarnation == meter.incarnation:
        missing = 0.0 if meter.over else min(max(0.0, at - meter.at), max(0.0, ran))
    else:
        missing = max(0.0, ran)
    return replace(meter, incarnation=incarnation, at=at, used=0, over=True, unsampled=meter.unsampled + missing)


def accrue(ledger: Ledger, boot: str, at: float) -> Ledger:
    """Add what was reserved until now. The time between two boots is not counted."""
    seconds = max(0.0, at - ledger.at) if boot == ledger.boot else 0.0
    reserved = ReservedTotals(
        instances=ledger.reserved.instances + ledger.instances * seconds,
        cpus=ledger.reserved.cpus + ledger.cpus * seconds,
        memory=ledger.reserved.memory + ledger.memory * seconds,
    )
    return replace(ledger, boot=boot, at=at, reserved=reserved)


def totals(account: Account, until: float = 0.0) -> UsedTotals:
    """The totals of an account; its last sample of memory was still right at the time `until`."""
    memory, moved = hold(account.memory, until), traffic_totals(account.ports.values())
    return UsedTotals(
        cpu=account.cpu.total,
        received=moved.received,
        received_packets=moved.received_packets,
        sent=moved.sent,
        sent_packets=moved.sent_packets,
        memory=memory.total,
        memory_sampled=memory.sampled,
        memory_unsampled=memory.unsampled,
    )


def traffic_totals(those: Iterable[TrafficMeters]) -> TrafficTotals:
    """The sums of the meters' totals."""
    some = list(those)
    names = TrafficTotals.__struct_fields__
    return TrafficTotals(**{name: sum(getattr(each, name).total for each in some) for name in names})


def add(those: Iterable[UsedTotals]) -> UsedTotals:
    """The sum."""
    some = list(those)
    return UsedTotals(**{name: sum(getattr(each, name) for each in some) for name in UsedTotals.__struct_fields__})


def subtract(those: S, earlier: S) -> S:
    """The difference of two totals; no part of it is negative."""
    before = asdict(earlier)
    return type(those)(**{name: max(0, value - before[name]) for name, value in asdict(those).items()})
