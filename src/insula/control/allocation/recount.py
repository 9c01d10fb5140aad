"""Recounts the usage of a tenant from its objects, and repairs the record that has it.

Every transaction that changes a counted object changes the record too, so the two agree. A record that an earlier
version wrote lacks the quotas that it did not count: it is recounted before requests are served (`outdated`). All
others are compared once after each start and every hour; a difference is a defect, which is logged and repaired.
"""

from __future__ import annotations

import contextlib
import logging

import msgspec

from insula.control.accounting.ledger import ledger_with
from insula.control.allocation.quotas import OF_INSTANCES, of_images, of_instances, of_snapshots, total
from insula.control.allocation.transaction import retried, turn
from insula.control.keys import (
    ADDRESS_GROUPS,
    CERTIFICATES,
    FLOATING_IPS,
    IMAGES,
    INSTANCES,
    LOAD_BALANCERS,
    NETWORKS,
    POLICIES,
    PRINCIPALS,
    ROUTERS,
    SNAPSHOTS,
    TENANTS,
    TOKENS,
    USAGE,
)
from insula.model.errors import Failed
from insula.model.quotas import STORED
from insula.model.views import Usage
from insula.store.protocol import Compare, Entry, Store

log = logging.getLogger("insula.control")


async def recount(store: Store, tenant: str, before: Usage | None = None) -> Usage:
    """Count the objects that are stored now. If one is damaged, which is a problem of this host anyway, what its kind
    counts is taken from `before`. Failed without that."""
    usage = Usage()
    for count in (
        _of_instances,
        _of_networks,
        _of_routers,
        _of_policies,
        _of_address_groups,
        _of_floating_ips,
        _of_load_balancers,
        _of_images,
        _of_principals,
    ):
        try:
            part = await count(store, tenant)
        except Failed:
            if before is None:
                raise
            part = Usage(**{name: getattr(before, name) for name in _COUNTS[count]})
        usage = total(usage, part)
    return usage


async def _of_instances(store: Store, tenant: str) -> Usage:
    instances, snapshots = await INSTANCES.list(store, tenant), await SNAPSHOTS.list(store, tenant)
    return total(of_instances(instances), of_snapshots(snapshots))


async def _of_networks(store: Store, tenant: str) -> Usage:
    return Usage(networks=len(await NETWORKS.list(store, tenant)))


async def _of_routers(store: Store, tenant: str) -> Usage:
    return Usage(routers=len(await ROUTERS.list(store, tenant)))


async def _of_policies(store: Store, tenant: str) -> Usage:
    return Usage(policies=len(await POLICIES.list(store, tenant)))


async def _of_address_groups(store: Store, tenant: str) -> Usage:
    return Usage(address_groups=len(await ADDRESS_GROUPS.list(store, tenant)))


async def _of_floating_ips(store: Store, tenant: str) -> Usage:
    return Usage(floating_ips=len(await FLOATING_IPS.list(store, tenant)))


async def _of_load_balancers(store: Store, tenant: str) -> Usage:
    return Usage(load_balancers=len(await LOAD_BALANCERS.list(store, tenant)))


async def _of_images(store: Store, tenant: str) -> Usage:
    return of_images(await IMAGES.list(store, tenant))


async def _of_principals(store: Store, tenant: str) -> Usage:
    accounts = {principal.id for principal in await PRINCIPALS.list(store, tenant)}
    if not accounts:
        return Usage()
    owners = [token.principal for token in await TOKENS.list(store)]
    owners += [certificate.principal for certificate in await CERTIFICATES.list(store)]
    return Usage(service_accounts=len(accounts), tokens=sum(owner in accounts for owner in owners))


async def repair(store: Store, tenant: str) -> Usage | None:
    """Compare the record of a tenant's usage with its objects, and replace it if they differ. Return what it was if it
    differed, else None. Nothing is done for a tenant that is gone."""

    async def attempt() -> Usage | None:
        entry = await store.get(USAGE.key(tenant))
        if entry is None or await store.get(TENANTS.key(tenant)) is None:
            return None
        try:
            before = USAGE.decode(entry)
        except Failed:  # damaged: all is counted anew
            before = None
        usage = await recount(store, tenant, before)
        if before == usage:
            return None
        writes = [USAGE.put(usage, tenant), await ledger_with(store, tenant, usage)]
        await store.transact([Compare(entry.key, entry.revision)], writes)
        return before or Usage()

    async with turn(store, tenant):
        return await retried(attempt, USAGE.key(tenant))


async def repair_all(store: Store) -> None:
    """Repair the records of all tenants, and log each that was wrong."""
    for entry in (await store.list(TENANTS.prefix_all())).entries:
        (tenant,) = TENANTS.parts(entry.key)
        try:
            before = await repair(store, tenant)
        except Failed as error:  # record and objects are damaged
            log.error("the usage of tenant %s is not known: %s", tenant, error)
            continue
        if before is not None:
            log.error("the usage of tenant %s was recorded as %s, and is counted anew", tenant, before)


async def migrate(store: Store) -> None:
    """Recount the tenants whose records are of an earlier version, which did not count all quotas."""
    for entry in (await store.list(USAGE.prefix_all())).entries:
        if outdated(entry):
            (tenant,) = USAGE.parts(entry.key)
            with contextlib.suppress(Failed):  # it is damaged, and so is an object; `load` records that
                await repair(store, tenant)
            log.info("the usage of tenant %s was recorded by an earlier version, and is counted anew", tenant)


def outdated(entry: Entry) -> bool:
    """Whether a stored usage lacks a quota that is counted now, or is damaged."""
    try:
        USAGE.decode(entry)
        found = msgspec.json.decode(entry.value, type=dict[str, object])
    except (Failed, msgspec.MsgspecError):
        return True
    return any(quota.name not in found for quota in STORED)


_COUNTS = {
    _of_instances: OF_INSTANCES,
    _of_networks: ("networks",),
    _of_routers: ("routers",),
    _of_policies: ("policies",),
    _of_address_groups: ("address_groups",),
    _of_floating_ips: ("floating_ips",),
    _of_load_balancers: ("load_balancers",),
    _of_images: ("images", "image_bytes", "config_bytes"),
    _of_principals: ("service_accounts", "tokens"),
}
"""The quotas that each of these counts; a test compares them with the table."""
