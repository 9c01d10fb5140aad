"""Loads the instances of this host from the store when the daemon starts, before it answers requests.

A damaged record makes its own object unusable and no other; it is recorded as a problem of this host. Leftovers, which
are containers and directories of no instance, are found here too; `sweep` removes them beside requests. While a record
can't be read nothing counts as a leftover.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from insula.control.context import Context
from insula.control.disk import has_tree, release_project, reserved_projects, trees_in_pool
from insula.control.instances.controller import InstanceController
from insula.control.instances.damaged import id_of
from insula.control.instances.drivers.base import Driver
from insula.control.instances.managed import ManagedInstance
from insula.control.keys import (
    ENDPOINTS,
    FLOATING_IPS,
    GUARANTEES,
    INSTANCES,
    LOAD_BALANCERS,
    NETWORKS,
    PEERINGS,
    ROUTERS,
    STATUS,
    TENANTS,
    USAGE,
)
from insula.control.tasks import within_limit
from insula.model.objects import InstanceStatus, Tenant
from insula.store.protocol import Snapshot, Store, TransactionConflict
from insula.store.typed import Found, Keyspace

log = logging.getLogger("insula.reconcile")
T = TypeVar("T")
_OF_NETWORKS: Sequence[Keyspace[Any]] = (
    *(NETWORKS, ROUTERS, PEERINGS, ENDPOINTS, GUARANTEES, FLOATING_IPS, LOAD_BALANCERS),
)


class Leftovers(NamedTuple):
    """Containers, directories and project IDs of this host that belong to no instance."""

    strays: Sequence[tuple[Driver, str]] = ()
    directories: Sequence[str] = ()
    projects: Mapping[str, int] = {}


class Loaded(NamedTuple):
    """The tenants and leftovers, and the revision of the store to watch it from."""

    revision: int
    tenants: Sequence[Tenant]
    leftovers: Leftovers


async def load(context: Context, controller: InstanceController) -> Loaded:
    """Add every instance of this host to the controller."""
    store = context.store
    projects = await reserved_projects(context)  # before the instances, of which each was stored with its ID
    entries, statuses, usages, tenants = await asyncio.gather(
        *(store.list(kind.prefix_all()) for kind in (INSTANCES, STATUS, USAGE, TENANTS))
    )
    owners = {found.value.name: found.value for found in _whole(context, TENANTS, tenants)}
    for kind in _OF_NETWORKS:
        _whole(context, kind, await store.list(kind.prefix_all()))
    _whole(context, USAGE, usages, needed=False)
    known, old = {}, list[ManagedInstance]()
    for entry in statuses.entries:
        for found in _whole(context, STATUS, Snapshot([entry], 0), needed=False):
            known[STATUS.parts(entry.key)] = found.value
    for instance, revision in _whole(context, INSTANCES, entries):
        status = known.pop((instance.tenant, instance.name), None) or InstanceStatus(state="created")
        if instance.host not in ("", context.host):
            controller.managed.complete = False
            continue
        if owner := owners.get(instance.tenant):
            own = msgspec.structs.replace(instance, host=context.host)
            controller.add(managed := ManagedInstance(owner, own, status, revision))
            if not instance.host:
                old.append(managed)
        else:
            context.problems[f"instance {instance.tenant}/{instance.name}"] = "there is no record of its tenant"
    if old:
        await context.problems.guard("records of 0.1.0", _take(context, old))
    leftovers = Leftovers()
    if not context.unreadable:
        if known:
            await context.problems.guard("statuses of instances that are gone", _forget(store, known))
        ids = {id_of(entry) for entry in entries.entries}
        try:
            leftovers = await asyncio.to_thread(_leftovers, context, ids, projects)
        except Exception as error:
            context.problems.report("leftovers", error)
    return Loaded(entries.revision, list(owners.values()), leftovers)


def _whole(context: Context, kind: Keyspace[T], snapshot: Snapshot, *, needed: bool = True) -> Sequence[Found[T]]:
    """The objects of these entries. A damaged one is recorded as a problem and left out."""
    good, bad = kind.sort_out(snapshot.entries)
    for entry, error in bad:
        context.problems[f"record {entry.key}"] = str(error)
        if needed:
            context.unreadable.add(entry.key)
    return good


async def _take(context: Context, old: Sequence[ManagedInstance]) -> None:
    """Commit that these instances are of this host. 0.1.0 stored no host, since each store had only one."""
    puts = [INSTANCES.put(managed.instance, *managed.key) for managed in old]
    revision = await context.store.transact([], puts)
    for managed in old:
        managed.revision = revision


async def _forget(store: Store, keys: Iterable[tuple[str, ...]]) -> None:
    """Delete statuses that belong to no instance. If another daemon has just made the instance, its status stays."""
    for parts in keys:
        with contextlib.suppress(TransactionConflict):
            await store.transact([INSTANCES.absent(*parts)], [STATUS.delete(*parts)])


def _leftovers(context: Context, ids: set[str | None], projects: Mapping[str, int]) -> Leftovers:
    strays = [(driver, each) for driver in context.drivers.values() for each in driver.ids() - ids]
    directories = set(os.listdir(context.settings.instances)) | trees_in_pool(context)
    free = {instance_id: project for instance_id, project in projects.items() if instance_id not in ids}
    return Leftovers(strays, sorted(directories - ids), free)


async def sweep(context: Context, controller: InstanceController, leftovers: Leftovers) -> None:
    """Remove leftovers. A failure is recorded as a problem of this host."""
    for driver, stray in leftovers.strays:
        removal = within_limit("its removal", driver.discard_stray(stray))
        await context.problems.guard(f"container {stray}", removal)
    for directory in leftovers.directories:
        for driver in context.drivers.values():
            await controller.lifecycle.remove_directory(driver, directory)
    for instance_id, project in leftovers.projects.items():
        if not await asyncio.to_thread(has_tree, context, instance_id):
            await release_project(context, project, instance_id)
