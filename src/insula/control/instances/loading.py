"""What a daemon that starts takes from the store before it answers: every instance of its host, and nothing looked at.

A damaged record costs its object and no other, and is a problem of this host. What is on the host of nobody is found
here too, and removed by `sweep` behind requests. While a record can't be read nothing is anybody's leftover.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec

from insula.control.context import Context
from insula.control.instances.controller import LIMIT, InstanceController
from insula.control.instances.damaged import id_of
from insula.control.instances.drivers.base import Driver
from insula.control.instances.managed import ManagedInstance
from insula.control.keys import INSTANCES, NETWORKS, STATUS, TENANTS, USAGE
from insula.model.objects import Instance, InstanceStatus, Tenant
from insula.store.protocol import Delete, Snapshot
from insula.store.typed import Found, Keyspace

log = logging.getLogger("insula.reconcile")
T = TypeVar("T")


class Leftovers(NamedTuple):
    """Containers and directories on this host that belong to no instance."""

    strays: Sequence[tuple[Driver, str]] = ()
    directories: Sequence[str] = ()


class Loaded(NamedTuple):
    """`revision` is that of the store, to watch it from there."""

    revision: int
    tenants: Sequence[Tenant]
    leftovers: Leftovers


async def load(context: Context, controller: InstanceController) -> Loaded:
    """Bring the controller every instance of this host."""
    store = context.store
    entries, statuses, networks, usages, tenants = await asyncio.gather(
        *(store.list(kind.prefix_all()) for kind in (INSTANCES, STATUS, NETWORKS, USAGE, TENANTS))
    )
    owners = {found.value.name: found.value for found in _whole(context, TENANTS, tenants)}
    _whole(context, NETWORKS, networks)
    _whole(context, USAGE, usages, needed=False)
    known = {}
    for entry in statuses.entries:
        for found in _whole(context, STATUS, Snapshot([entry], 0), needed=False):
            known[STATUS.parts(entry.key)] = found.value
    for instance, revision in _whole(context, INSTANCES, entries):
        status = known.pop((instance.tenant, instance.name), None) or InstanceStatus(state="created")
        if instance.host not in ("", context.host):
            continue
        if not instance.host:  # stored by 0.1.0, when a store had one host
            instance, revision = await _take(context, instance, revision)
        if owner := owners.get(instance.tenant):
            controller.add(ManagedInstance(owner, instance, status, revision))
        else:
            context.problems[f"instance {instance.tenant}/{instance.name}"] = "there is no record of its tenant"
    leftovers = Leftovers()
    if not context.unreadable:
        if known:
            await store.transact([], [Delete(STATUS.key(*parts)) for parts in known])
        ids = {id_of(entry) for entry in entries.entries}
        try:
            leftovers = await asyncio.to_thread(_leftovers, context, ids)
        except Exception as error:
            context.problems.report("leftovers", error)
    return Loaded(entries.revision, list(owners.values()), leftovers)


def _whole(context: Context, kind: Keyspace[T], snapshot: Snapshot, *, needed: bool = True) -> Sequence[Found[T]]:
    """The objects among these entries; each damaged one is a problem."""
    good, bad = kind.sort_out(snapshot.entries)
    for entry, error in bad:
        context.problems[f"record {entry.key}"] = str(error)
        if needed:
            context.unreadable.add(entry.key)
    return good


async def _take(context: Context, instance: Instance, revision: int) -> Found[Instance]:
    """The instance as one of this host's."""
    instance = msgspec.structs.replace(instance, host=context.host)
    put = INSTANCES.put(instance, instance.tenant, instance.name)
    return Found(instance, await context.store.put(put.key, put.value, expect=revision))


def _leftovers(context: Context, ids: set[str | None]) -> Leftovers:
    strays = [(driver, each) for driver in context.drivers.values() for each in driver.ids() - ids]
    return Leftovers(strays, sorted(set(os.listdir(context.settings.instances)) - ids))


async def sweep(context: Context, controller: InstanceController, leftovers: Leftovers) -> None:
    """Remove them; what can't be is a problem of this host."""
    for driver, stray in leftovers.strays:
        name = f"container {stray}"
        try:
            await asyncio.wait_for(driver.discard_stray(stray), LIMIT)
            context.problems.solved(name)
        except Exception as error:
            context.problems.report(name, error)
    for directory in leftovers.directories:
        for driver in context.drivers.values():
            await controller.lifecycle.remove_directory(driver, directory)
