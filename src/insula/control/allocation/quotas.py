"""Quotas: limits on sums over a tenant's objects. A request beyond them is refused before anything is made.

`/usage/TENANT` holds the sums, a `Usage`. It is also the tenant's *guard*: every transaction that adds something to a
tenant, or removes something that is counted, rewrites it and compares its revision (transaction.py). So two concurrent
requests can't both take the last part of a quota. And the removal of a tenant or network that nothing used fails if
something was added meanwhile. An instance without a limit of its own adds nothing to the sum of CPUs or memory; then
the tenant's control group limits it.

The kinds are the table of model/quotas.py; what an object counts is a `Usage` as well.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from insula.model.errors import Invalid, QuotaExceeded
from insula.model.objects import Image, ImageConfig, Instance, InstanceSpec, Limits, Resources, Struct, Tenant, disks_of
from insula.model.quotas import QUOTAS, STORED, TABLE, Quota
from insula.model.rules import MAX_BYTES
from insula.model.snapshots import InstanceSnapshot
from insula.model.units import format_size, shorten
from insula.model.views import LimitsPatch, Usage

S = TypeVar("S", bound=Struct)
OF_INSTANCES = ("instances", "cpus", "memory", "disk", "inodes", "ports", "published_ports", "spec_bytes", "log_bytes")
"""The quotas of what instances count, with their snapshots."""
_NO_CONFIG = ImageConfig()
_encode = msgspec.json.Encoder().encode
_ROUNDING = 1e-9  # sums of fractions of a CPU are not exact


def of_instance(spec: InstanceSpec, config: ImageConfig = _NO_CONFIG) -> Usage:
    """What an instance counts, running or not: the quotas `OF_INSTANCES`. Its record is in the store and in memory, so
    that its size counts: as JSON, without the name, which may change."""
    resources = spec.resources
    return Usage(
        instances=1,
        cpus=resources.cpus or 0.0,
        memory=resources.memory or 0,
        disk=(resources.disk or 0) + sum(each.size for each in disks_of(spec)),
        inodes=resources.inodes or 0,
        ports=len(spec.networks),
        published_ports=sum(each.count for each in spec.published),
        spec_bytes=len(_encode(spec)) - len(spec.name) + len(_encode(config)),
        log_bytes=spec.log_size * spec.log_files,
    )


def of_instances(instances: Iterable[Instance]) -> Usage:
    """What instances count together."""
    return functools.reduce(total, (of_instance(each.spec, each.config) for each in instances), Usage())


def of_snapshots(snapshots: Iterable[InstanceSnapshot]) -> Usage:
    """What snapshots of instances count together: the space of their files, also that which they share."""
    return Usage(disk=sum(each.size for each in snapshots))


def of_images(images: Iterable[Image]) -> Usage:
    """What a tenant's images count together. Their content counts once, however many of them have it; the record of
    each, which has its configuration, is in every list of them."""
    found, content = [*images], dict[str, int]()
    for image in found:
        content.update(image.content or {image.digest: image.size})
    records = sum(len(_encode(image)) for image in found)
    return Usage(images=len(found), image_bytes=sum(content.values()), config_bytes=records)


def add(tenant: Tenant, usage: Usage, more: Usage) -> Usage:
    """The usage with what one more object counts. QuotaExceeded."""
    for quota in STORED:
        if getattr(more, quota.name):
            check_fits(tenant, quota, getattr(usage, quota.name), getattr(more, quota.name))
    return total(usage, more)


def change(tenant: Tenant, usage: Usage, before: Usage, after: Usage) -> Usage:
    """The usage after an object has changed. QuotaExceeded if it counts more than before, beyond a quota; to count less
    is always allowed."""
    others = subtract(usage, before)
    for quota in STORED:
        old, new = getattr(before, quota.name), getattr(after, quota.name)
        if new > old and not quota.unit:  # the error tells how many there are
            check_fits(tenant, quota, getattr(usage, quota.name), new - old)
        elif new > old:
            check_fits(tenant, quota, getattr(others, quota.name), new)
    return total(others, after)


def exchange(usage: Usage, before: Usage, after: Usage) -> Usage:
    """The usage after an object has changed, without a check against the quota."""
    return total(subtract(usage, before), after)


def total(usage: Usage, more: Usage) -> Usage:
    """The sum, without a check against the quota."""
    return _combined(usage, more, 1)


def subtract(usage: Usage, less: Usage) -> Usage:
    """The usage without what an object counts. It is never negative."""
    return _combined(usage, less, -1)


def _combined(usage: Usage, other: Usage, sign: int) -> Usage:
    sums = {q.name: getattr(usage, q.name) + sign * getattr(other, q.name) for q in STORED if getattr(other, q.name)}
    return msgspec.structs.replace(
        usage,
        **{name: max(0, value) if QUOTAS[name].whole else max(0.0, round(value, 6)) for name, value in sums.items()},
    )


def check_fits(tenant: Tenant, quota: Quota, used: float, asked: float) -> None:
    """Raise QuotaExceeded if the tenant may not have `asked` more beside what it uses."""
    limit = getattr(tenant.limits, quota.name)
    if limit is not None and used + asked > limit + (0 if quota.whole else _ROUNDING):
        raise exceeded(f"tenant {tenant.name}", quota, limit, used, asked)


def exceeded(who: str, quota: Quota, limit: float, used: float, asked: float) -> QuotaExceeded:
    """Return the error for somebody who has `used` of a quota, and asks for more than is left."""
    has, left = quota.show(used), quota.show(max(0, round(limit - used, 6)))
    if quota.unit:
        of = "" if quota.unit == "cpus" else "of "
        what = (
            f"may use {quota.show(limit)} {of}{quota.what} and has {has} in use, {quota.show(asked)} asked: {left} left"
        )
    else:
        what = f"may have {quota.show(limit)} {quota.what} and has {has}: {left} left"
    where = quota.option if quota.name in QUOTAS else f"{quota.name} in [quotas] of insulad.toml"
    hint = f"remove what is not needed, ask for less, or have an operator raise the limit ({where})"
    return QuotaExceeded(f"{who} {what}", hint)


def check_covers(tenant: Tenant, limits: Limits, usage: Usage) -> None:
    """Raise QuotaExceeded if the tenant's usage is above these limits."""
    for quota in STORED:
        limit, used = getattr(limits, quota.name), getattr(usage, quota.name)
        if limit is not None and used > limit + (0 if quota.whole else _ROUNDING):
            of = "of " if quota.unit == "bytes" else ""
            what = f"has {quota.show(used)} {of}{quota.what} in use, not {quota.show(limit)}"
            raise QuotaExceeded(f"tenant {tenant.name} {what}", "remove some, or lower the limits of instances, first")


def merge(now: S, patch: Struct) -> S:
    """`now` with the patch applied (RFC 7396, JSON Merge Patch). Invalid if the patch is empty."""
    changes = {name: value for name, value in msgspec.structs.asdict(patch).items() if value is not msgspec.UNSET}
    if not changes:
        raise Invalid("there is nothing to change", "give a limit and its new value")
    return msgspec.structs.replace(now, **changes)


def limits_of(defaults: Limits, given: LimitsPatch) -> Limits:
    """Return the limits of a new tenant: `given`, and the defaults for those that are absent. Invalid."""
    fields = msgspec.structs.asdict(given)
    return check_limits(
        msgspec.structs.replace(defaults, **{k: v for k, v in fields.items() if v is not msgspec.UNSET})
    )


def check_limits(limits: Limits) -> Limits:
    """Check the limits of a tenant and return them. Invalid."""
    for quota in TABLE:
        _check(quota, getattr(limits, quota.name))
    return limits


def check_resources(resources: Resources) -> Resources:
    """Check the limits of one instance and return them. Invalid."""
    for name in ("cpus", "memory", "pids", "disk", "inodes"):
        _check(QUOTAS[name], getattr(resources, name))
    return resources


def _check(quota: Quota, limit: float | None) -> None:
    """Raise Invalid for a limit out of bounds; also for NaN."""
    if limit is None or quota.least <= limit <= quota.most:
        return
    if quota.unit == "bytes":
        what = "too much" if limit > MAX_BYTES else f"{format_size(int(limit))} of {quota.what}, which is too little"
        raise Invalid(f"there can't be a limit of {what}", f"use {format_size(int(quota.least)).lower()} or more")
    bounds = f"use {quota.least:g} to {quota.most}, or no limit"
    raise Invalid(f"there can't be a limit of {shorten(limit)} {quota.what}", bounds)
