"""Quotas: limits on the sums over a tenant's instances. A request beyond them is refused before anything is made.

`/usage/TENANT` holds the sums. It is also the tenant's *guard*: every transaction that adds something to a tenant
rewrites it and compares its revision (transaction.py). So two concurrent requests can't both take the last part of a
quota. And the removal of a tenant or network that nothing used fails if something was added meanwhile. An instance
without a limit of its own adds nothing to the sum of CPUs or memory; then the tenant's control group limits it.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from insula.model.errors import Invalid, QuotaExceeded
from insula.model.objects import Limits, Resources, Struct, Tenant
from insula.model.rules import MAX_BYTES, MAX_CPUS, MAX_INSTANCES, MAX_PIDS, MIN_BANDWIDTH, MIN_CPUS, MIN_MEMORY
from insula.model.units import format_size, shorten
from insula.model.views import Usage

S = TypeVar("S", bound=Struct)


def add(tenant: Tenant, usage: Usage, resources: Resources) -> Usage:
    """The usage with one more instance. QuotaExceeded."""
    limits = tenant.limits
    total = _sum(usage, resources)
    if limits.instances is not None and total.instances > limits.instances:
        raise _exceeded(tenant, f"may have {limits.instances} instances and has {usage.instances}")
    _check_cpus_fit(tenant, usage, resources)
    _check_memory_fits(tenant, usage, resources)
    return total


def change(tenant: Tenant, usage: Usage, before: Resources, after: Resources) -> Usage:
    """The usage after a change of one instance's limits. QuotaExceeded if a limit rises beyond the quota; lowering one
    is always allowed."""
    others = subtract(usage, before)
    if (after.cpus or 0.0) > (before.cpus or 0.0):
        _check_cpus_fit(tenant, others, after)
    if (after.memory or 0) > (before.memory or 0):
        _check_memory_fits(tenant, others, after)
    return _sum(others, after)


def exchange(usage: Usage, before: Resources, after: Resources) -> Usage:
    """The usage after a change of one instance's limits, without a check against the quota."""
    return _sum(subtract(usage, before), after)


def check_covers(tenant: Tenant, limits: Limits, usage: Usage) -> None:
    """Raise QuotaExceeded if the tenant's usage is above these limits."""
    hint = "remove instances, or lower the limits of theirs, first"
    if limits.instances is not None and usage.instances > limits.instances:
        raise QuotaExceeded(f"tenant {tenant.name} has {usage.instances} instances, not {limits.instances}", hint)
    if limits.cpus is not None and usage.cpus > limits.cpus + 1e-9:
        raise QuotaExceeded(f"tenant {tenant.name} has {usage.cpus:g} CPUs in use, not {limits.cpus:g}", hint)
    if limits.memory is not None and usage.memory > limits.memory:
        has, asked = format_size(usage.memory), format_size(limits.memory)
        raise QuotaExceeded(f"tenant {tenant.name} has {has} of memory in use, not {asked}", hint)


def merge(now: S, patch: Struct) -> S:
    """`now` with the patch applied (RFC 7396, JSON Merge Patch). Invalid if the patch is empty."""
    changes = {name: value for name, value in msgspec.structs.asdict(patch).items() if value is not msgspec.UNSET}
    if not changes:
        raise Invalid("there is nothing to change", "give a limit and its new value")
    return msgspec.structs.replace(now, **changes)


def _sum(usage: Usage, resources: Resources) -> Usage:
    return Usage(
        instances=usage.instances + 1,
        cpus=round(usage.cpus + (resources.cpus or 0.0), 6),
        memory=usage.memory + (resources.memory or 0),
    )


def _check_cpus_fit(tenant: Tenant, usage: Usage, resources: Resources) -> None:
    limit, asked = tenant.limits.cpus, resources.cpus
    if limit is not None and asked and usage.cpus + asked > limit + 1e-9:
        raise _exceeded(tenant, f"may use {limit:g} CPUs and has {usage.cpus:g} in use, {asked:g} asked")


def _check_memory_fits(tenant: Tenant, usage: Usage, resources: Resources) -> None:
    limit, asked = tenant.limits.memory, resources.memory
    if limit is not None and asked and usage.memory + asked > limit:
        has, more = format_size(usage.memory), format_size(asked)
        raise _exceeded(tenant, f"may use {format_size(limit)} of memory and has {has} in use, {more} asked")


def subtract(usage: Usage, resources: Resources) -> Usage:
    """The usage without one instance."""
    return Usage(
        instances=max(0, usage.instances - 1),
        cpus=max(0.0, round(usage.cpus - (resources.cpus or 0.0), 6)),
        memory=max(0, usage.memory - (resources.memory or 0)),
    )


def _exceeded(tenant: Tenant, what: str) -> QuotaExceeded:
    return QuotaExceeded(f"tenant {tenant.name} {what}", "remove instances, ask for less, or raise the tenant's limits")


def check_limits(limits: Limits) -> Limits:
    """Check the limits of a tenant and return them. Invalid."""
    _check_cpus(limits.cpus)
    _check_memory(limits.memory)
    _check_pids(limits.pids)
    if limits.instances is not None and not 0 <= limits.instances <= MAX_INSTANCES:
        raise Invalid(f"a tenant can't be limited to {limits.instances} instances", "use 0 to 1000000")
    if limits.bandwidth is not None and not MIN_BANDWIDTH <= limits.bandwidth <= MAX_BYTES:
        raise Invalid(f"a bandwidth of {limits.bandwidth} bits a second is too little or too much", "use 8k or more")
    return limits


def check_resources(resources: Resources) -> Resources:
    """Check the limits of one instance and return them. Invalid."""
    _check_cpus(resources.cpus)
    _check_memory(resources.memory)
    _check_pids(resources.pids)
    return resources


def _check_pids(pids: int | None) -> None:
    if pids is not None and not 1 <= pids <= MAX_PIDS:
        raise Invalid(f"there can't be a limit of {pids} processes", "use 1 to 4194304 (proc(5), pid_max)")


def _check_cpus(cpus: float | None) -> None:
    if cpus is not None and not MIN_CPUS <= cpus <= MAX_CPUS:
        raise Invalid(f"there can't be a limit of {shorten(cpus)} CPUs", "use 0.01 or more, as in 0.5, or no limit")


def _check_memory(memory: int | None) -> None:
    if memory is not None and not MIN_MEMORY <= memory <= MAX_BYTES:
        what = "too much" if memory > MAX_BYTES else f"{format_size(memory)} of memory, which is too little"
        raise Invalid(f"there can't be a limit of {what}", f"use {format_size(MIN_MEMORY).lower()} or more")
