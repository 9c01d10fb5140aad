"""What a tenant may use: limits on the sums over its instances, refused before anything is made.

`/usage/TENANT` holds the sums, and is the tenant's *guard*: whatever adds something to a tenant rewrites it in the
same transaction, and compares its revision. So two who add at the same time can't both take the last place, and
who removes a tenant or a network, having seen that nothing uses it, learns by the same comparison when that has
changed meanwhile. An instance without a limit of its own adds nothing to the sum of CPUs or memory; the tenant's
control group bounds it then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from insula.control.claims import ATTEMPTS
from insula.control.keys import USAGE
from insula.model.errors import Conflict, Invalid, QuotaExceeded
from insula.model.objects import Limits, Resources, Tenant
from insula.model.units import format_size, shorten
from insula.model.views import Usage
from insula.store.protocol import Store, TransactionConflict
from insula.store.typed import Found

T = TypeVar("T")

MIN_MEMORY = 6 << 20  # less, and the kernel kills the process that sets the container up
MAX_BYTES = (1 << 63) - 1


async def guarded(store: Store, tenant: str, attempt: Callable[[Found[Usage]], Awaitable[T]]) -> T:
    """`attempt` with the tenant's guard, again while its transaction fails for that was changed meanwhile."""
    for _ in range(8 * ATTEMPTS):
        found = await USAGE.get(store, tenant) or Found(Usage(), 0)
        try:
            return await attempt(found)
        except TransactionConflict as conflict:
            if conflict.key != USAGE.key(tenant):
                raise
    raise Conflict(f"tenant {tenant} is changed all the time", "try again")


def add(tenant: Tenant, usage: Usage, resources: Resources) -> Usage:
    """The usage with one more instance, or QuotaExceeded."""
    limits = tenant.limits
    total = Usage(
        instances=usage.instances + 1,
        cpus=round(usage.cpus + (resources.cpus or 0.0), 6),
        memory=usage.memory + (resources.memory or 0),
    )
    if limits.instances is not None and total.instances > limits.instances:
        raise _exceeded(tenant, f"may have {limits.instances} instances and has {usage.instances}")
    if limits.cpus is not None and resources.cpus and total.cpus > limits.cpus + 1e-9:
        raise _exceeded(tenant, f"may use {limits.cpus:g} CPUs and has {usage.cpus:g} in use, {resources.cpus:g} asked")
    if limits.memory is not None and resources.memory and total.memory > limits.memory:
        has, asked = format_size(usage.memory), format_size(resources.memory)
        raise _exceeded(tenant, f"may use {format_size(limits.memory)} of memory and has {has} in use, {asked} asked")
    return total


def subtract(usage: Usage, resources: Resources) -> Usage:
    """The usage with one instance less."""
    return Usage(
        instances=max(0, usage.instances - 1),
        cpus=max(0.0, round(usage.cpus - (resources.cpus or 0.0), 6)),
        memory=max(0, usage.memory - (resources.memory or 0)),
    )


def _exceeded(tenant: Tenant, what: str) -> QuotaExceeded:
    return QuotaExceeded(f"tenant {tenant.name} {what}", "remove instances, ask for less, or raise the tenant's limits")


def check_limits(limits: Limits) -> Limits:
    """The limits of a tenant, or Invalid."""
    _check_cpus(limits.cpus)
    _check_memory(limits.memory)
    if limits.instances is not None and not 0 <= limits.instances <= 1_000_000:
        raise Invalid(f"{limits.instances} instances make no sense", "use 0 to 1000000")
    if limits.bandwidth is not None and not 8000 <= limits.bandwidth <= MAX_BYTES:
        raise Invalid(f"a bandwidth of {limits.bandwidth} bits a second makes no sense", "use 8k or more")
    return limits


def check_resources(resources: Resources) -> Resources:
    """The limits of one instance, or Invalid."""
    _check_cpus(resources.cpus)
    _check_memory(resources.memory)
    if resources.pids is not None and not 1 <= resources.pids <= 4_194_304:
        raise Invalid(f"a limit of {resources.pids} processes makes no sense", "use 1 to 4194304 (proc(5), pid_max)")
    return resources


def _check_cpus(cpus: float | None) -> None:
    if cpus is not None and not 0.01 <= cpus <= 65536:
        raise Invalid(f"{shorten(cpus)} CPUs make no sense", "use 0.01 or more")


def _check_memory(memory: int | None) -> None:
    if memory is not None and not MIN_MEMORY <= memory <= MAX_BYTES:
        raise Invalid(f"{memory} bytes of memory are not enough", f"use {format_size(MIN_MEMORY)} or more")
