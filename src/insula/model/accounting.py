"""The usage of tenants and instances over time: as it is stored, and as it is shown.

Processor time is in nanoseconds, traffic in bytes and packets of layer 3, memory over time in byte-seconds. All of them
only grow. `at` is a time of CLOCK_BOOTTIME (clock_gettime(2)) in seconds, except in a `UsageSnapshot`.
"""

from __future__ import annotations

from insula.model.objects import Struct


class UsageMeter(Struct, kw_only=True):
    """A counter of the kernel. `raw` is its last reading, `total` the sum over all of its incarnations."""

    incarnation: str = ""
    raw: int = 0
    total: int = 0


class MemoryMeter(Struct, kw_only=True):
    """Memory over time, by samples. `used` is the last one, in bytes, taken `at` that time.

    `total` is the sum of the trapezoids between samples, in byte-seconds. They cover `sampled` seconds; `unsampled` are
    the seconds in which the instance ran and no samples were taken. `over`: this incarnation has ended.
    """

    incarnation: str = ""
    at: float = 0.0
    used: int = 0
    over: bool = True
    total: float = 0.0
    sampled: float = 0.0
    unsampled: float = 0.0


class Account(Struct, kw_only=True):
    """What one instance has used. `ports` are the packets of all ports that it has had, by their interfaces: what a
    port has moved that was unplugged is in the totals."""

    cpu: UsageMeter = UsageMeter()
    ports: dict[str, TrafficMeters] = {}  # noqa: RUF012 (msgspec copies mutable defaults)
    memory: MemoryMeter = MemoryMeter()


class TrafficMeters(Struct, kw_only=True):
    """The packets that a port, or the pulls and pushes of a tenant's images on one host, have received and sent."""

    received: UsageMeter = UsageMeter()
    received_packets: UsageMeter = UsageMeter()
    sent: UsageMeter = UsageMeter()
    sent_packets: UsageMeter = UsageMeter()


class TrafficTotals(Struct, kw_only=True):
    """Bytes and packets of layer 3."""

    received: int = 0
    received_packets: int = 0
    sent: int = 0
    sent_packets: int = 0


class UsedTotals(Struct, kw_only=True):
    """What one or more instances have used. `memory` is exact to the samples: see docs/accounting.md."""

    cpu: int = 0  # nanoseconds
    received: int = 0  # bytes
    received_packets: int = 0
    sent: int = 0
    sent_packets: int = 0
    memory: float = 0.0  # byte-seconds
    memory_sampled: float = 0.0  # seconds, of all instances together
    memory_unsampled: float = 0.0


class ReservedTotals(Struct, kw_only=True):
    """What a tenant's instances have reserved over time, running or not."""

    instances: float = 0.0  # seconds, of all instances together
    cpus: float = 0.0  # CPU-seconds
    memory: float = 0.0  # byte-seconds


class Ledger(Struct, kw_only=True):
    """A tenant's reservations: `instances`, `cpus` and `memory` since the time `at` of the boot `boot`, and `reserved`
    until then. `removed` is what removed instances had used."""

    boot: str = ""
    at: float = 0.0
    instances: int = 0
    cpus: float = 0.0
    memory: int = 0
    reserved: ReservedTotals = ReservedTotals()
    removed: UsedTotals = UsedTotals()


class Checkpoint(Struct, kw_only=True):
    """The time at which a host has last read its counters."""

    boot: str
    at: float


class UsageSnapshot(Struct, kw_only=True):
    """A tenant's totals at a time, in seconds since the epoch. `group` is the processor time of its control group,
    `images` the traffic of its pulls and pushes."""

    at: float
    used: UsedTotals = UsedTotals()
    group: int = 0
    images: TrafficTotals = TrafficTotals()
    reserved: ReservedTotals = ReservedTotals()


class History(Struct, kw_only=True):
    """The snapshots of one day (UTC), one for each hour in which something has changed."""

    snapshots: list[UsageSnapshot] = []  # noqa: RUF012 (msgspec copies mutable defaults)


# -- views -----------------------------------------------------------------------------------------------------------


class InstanceUsage(Struct, kw_only=True):
    """What an instance has used since it was created."""

    name: str
    used: UsedTotals


class TenantUsage(Struct, kw_only=True):
    """What a tenant has used and reserved between two times (seconds since the epoch).

    `used` is the sum over its instances, of which some may be gone. `other_cpu` is the remaining processor time of its
    control group, nanoseconds: its resolver, containers that were prepared and not used, and what could not be
    attributed. `images` is the traffic of pulls and pushes through the tenant's network. `instances` are those that
    exist, each since it was created; empty in a list of tenants.
    """

    tenant: str
    since: float
    until: float
    used: UsedTotals
    other_cpu: int
    images: TrafficTotals = TrafficTotals()
    reserved: ReservedTotals
    instances: list[InstanceUsage] = []  # noqa: RUF012
