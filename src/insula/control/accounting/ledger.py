"""Reservations over time: a `Ledger` for each tenant.

A transaction that changes what a tenant's instances reserve rewrites the ledger, too, and compares the tenant's guard
(allocation/transaction.py). So the time of every change is exact, whenever the daemon is killed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

from msgspec.structs import replace

from insula.control.accounting.meters import accrue, add
from insula.control.instances.drivers.directory import boot_id
from insula.control.keys import LEDGERS
from insula.model.accounting import Checkpoint, Ledger, UsedTotals
from insula.model.errors import Failed
from insula.model.views import Usage
from insula.store.protocol import Put, Store

_BOOT = boot_id()


class Moment(NamedTuple):
    """A time of CLOCK_BOOTTIME in one boot of the host. It goes on while the host sleeps, and never jumps."""

    boot: str
    at: float


def now() -> Moment:
    return Moment(_BOOT, time.clock_gettime(time.CLOCK_BOOTTIME))


async def read_ledger(store: Store, tenant: str) -> Ledger:
    """The tenant's ledger as it is stored; an empty one if there is none, or if it is damaged."""
    try:
        found = await LEDGERS.get(store, tenant)
    except Failed:  # a problem of the host since the daemon's start
        return Ledger()
    return found.value if found else Ledger()


async def ledger_with(store: Store, tenant: str, after: Usage, ended: UsedTotals | None = None) -> Put:
    """The write for a transaction after which the tenant's instances reserve `after`. `ended` is what an instance had
    used that this transaction removes."""
    ledger = accrue(await read_ledger(store, tenant), *now())
    if ended:
        ledger = replace(ledger, removed=add((ledger.removed, ended)))
    return LEDGERS.put(replace(ledger, instances=after.instances, cpus=after.cpus, memory=after.memory), tenant)


def first_ledger(tenant: str) -> Put:
    """The write for the transaction that makes a tenant."""
    return LEDGERS.put(accrue(Ledger(), *now()), tenant)


def after_boot(ledgers: Iterable[tuple[str, Ledger]], last: Checkpoint | None) -> list[Put]:
    """The writes that carry ledgers of an earlier boot into this one. The host was up until the checkpoint at least."""
    puts = []
    for tenant, ledger in ledgers:
        if ledger.boot == _BOOT:
            continue
        if last and last.boot == ledger.boot:
            ledger = accrue(ledger, last.boot, max(last.at, ledger.at))
        puts.append(LEDGERS.put(accrue(ledger, *now()), tenant))
    return puts
