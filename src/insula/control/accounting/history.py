"""A tenant's totals at past hours. `insula usage --since` subtracts them from those of now.

A day has one record with a snapshot for each hour, taken a moment after the hour has begun, if anything has changed
since the last one. Records of more than 400 days ago are deleted. So are the last totals of removed tenants, which are
kept for bills.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from msgspec.structs import replace

from insula.control.accounting.meters import subtract
from insula.control.keys import HISTORIES, REMOVED
from insula.model.accounting import History, TenantUsage, UsageSnapshot
from insula.model.errors import Failed
from insula.model.objects import Tenant
from insula.store.protocol import Entry, Store, Write

HOUR: Final = 3600
DAYS: Final = 400
MOST: Final = 1000
"""The number of removed tenants whose last totals are kept."""
_DAY: Final = 24 * HOUR


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(at))


async def append(store: Store, tenant: str, snapshot: UsageSnapshot) -> None:
    """Store a snapshot, unless there is one of the same hour or a later one."""
    day = _day(snapshot.at)
    history = History()
    with suppress(Failed):  # damaged: begin the day anew
        if found := await HISTORIES.get(store, tenant, day):
            history = found.value
    if history.snapshots and history.snapshots[-1].at // HOUR >= snapshot.at // HOUR:
        return
    writes: list[Write] = [HISTORIES.put(History(snapshots=[*history.snapshots, snapshot]), tenant, day)]
    if not history.snapshots:
        oldest, prefix = _day(snapshot.at - DAYS * _DAY), HISTORIES.prefix(tenant)
        days = (HISTORIES.parts(entry.key)[1] for entry in (await store.list(prefix)).entries)
        writes += [HISTORIES.delete(tenant, each) for each in days if each < oldest]
    await store.transact([], writes, durable=False)


async def before(store: Store, tenant: str, at: float) -> UsageSnapshot | None:
    """Return the last snapshot that is not later than `at`; None if there is none."""
    for month in _months(at):
        entries = (await store.list(f"{HISTORIES.prefix(tenant)}{month}")).entries
        for entry in reversed(entries):
            if found := _last(entry, at):
                return found
    return None


async def last_totals(store: Store, tenant: Tenant, totals: UsageSnapshot) -> list[Write]:
    """Return the writes that keep the totals of a tenant that is about to be removed, and delete what was kept for too
    long. Nothing is kept of a tenant that has used and reserved nothing."""
    oldest = _removal(totals.at - DAYS * _DAY)
    kept = [REMOVED.parts(entry.key) for entry in (await store.list(REMOVED.prefix_all())).entries]
    writes: list[Write] = [
        REMOVED.delete(*parts) for number, parts in enumerate(kept) if parts[0] < oldest or number <= len(kept) - MOST
    ]
    if replace(totals, at=0.0, group=0) != UsageSnapshot(at=0.0):
        last = between(tenant, UsageSnapshot(at=tenant.created), totals)
        writes.append(REMOVED.put(last, _removal(totals.at), tenant.name))
    return writes


def _removal(at: float) -> str:
    """Return a time as a part of a key, which sorts as the time does: milliseconds."""
    return f"{int(at * 1000):015}"


def between(tenant: Tenant, begun: UsageSnapshot, until: UsageSnapshot) -> TenantUsage:
    """Return what a tenant has used and reserved between two snapshots, without its instances."""
    used = subtract(until.used, begun.used)
    return TenantUsage(
        tenant=tenant.name,
        since=begun.at,
        until=until.at,
        used=used,
        other_cpu=max(0, until.group - begun.group - used.cpu),
        images=subtract(until.images, begun.images),
        reserved=subtract(until.reserved, begun.reserved),
    )


def _months(at: float) -> Iterator[str]:
    """Yield the month of a time, as the beginning of its days' names, and earlier ones as far as history goes."""
    year, month = time.gmtime(at)[:2]
    for _ in range(DAYS // 28 + 1):
        yield f"{year:04}-{month:02}-"
        year, month = (year, month - 1) if month > 1 else (year - 1, 12)


def _last(entry: Entry, at: float) -> UsageSnapshot | None:
    with suppress(Failed):
        return next((each for each in reversed(HISTORIES.decode(entry).snapshots) if each.at <= at), None)
    return None
