"""`Damaged`: instances whose record in the store can't be read. They are listed; `rm -f` removes them.

What such an instance owns is known in part only. Its id may still be readable. Its reservations have its name. Its
files, containers and ports are found by elimination: as soon as no record is damaged, they are the ones that belong to
no instance.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Sequence

import msgspec

from insula.control.accounting.ledger import ledger_with
from insula.control.allocation.quotas import OF_INSTANCES, of_instances, of_snapshots, subtract, total
from insula.control.allocation.transaction import guarded
from insula.control.disk import release_project, reserved_projects
from insula.control.instances.controller import InstanceController
from insula.control.instances.specs import cli_command
from insula.control.keys import ACCOUNTS, EVENTS, INSTANCES, SNAPSHOTS, STATUS, USAGE
from insula.control.networks.ports import is_port_reservation
from insula.model.errors import Conflict
from insula.model.objects import ImageConfig, Instance, InstanceSpec, InstanceStatus, OverlayRoot, Tenant
from insula.model.views import InstanceView, Usage
from insula.store.protocol import Compare, Delete, Entry, TransactionConflict, Write
from insula.store.typed import Found

_ID = re.compile("[0-9a-f]{32}")


class Damaged:
    def __init__(self, controller: InstanceController) -> None:
        self.context = controller.context
        self.controller = controller
        self.lifecycle = controller.lifecycle

    def names(self, tenant: str | None) -> Sequence[tuple[str, str]]:
        """Tenants and names of the instances whose records were damaged when the daemon started."""
        root = INSTANCES.prefix(tenant) if tenant else INSTANCES.prefix_all()
        keys = sorted(key for key in self.context.unreadable if key.startswith(root))
        return [(parts[0], parts[1]) for parts in map(INSTANCES.parts, keys) if len(parts) == 2]

    def views(self, tenant: str | None) -> Sequence[InstanceView]:
        return [_view(*key) for key in self.names(tenant)]

    async def remove(self, owner: Tenant, name: str) -> None:
        """Remove the instance: from the store first, so that the next daemon finishes if this one dies. Conflict."""
        tenant, key = owner.name, INSTANCES.key(owner.name, name)
        entry = await self.context.store.get(key)
        if entry is not None:
            try:
                await self._delete(entry, tenant, name)
            except TransactionConflict:
                raise Conflict(f"instance {name} was changed at the same time", "try again") from None
        self.context.unreadable.discard(key)
        self.context.problems.solved(f"record {key}")
        if entry is not None and (instance := id_of(entry)):
            await self._discard(instance)
        if not self.context.unreadable:
            await self._sweep(owner)

    async def _delete(self, entry: Entry, tenant: str, name: str) -> None:
        store = self.context.store
        everything = (await store.list("/claims/")).entries
        reserved = [each for each in everything if is_port_reservation(each, tenant, name)]
        instance = id_of(entry)
        snapshots = (await store.list(SNAPSHOTS.prefix(tenant, instance))).entries if instance else []

        async def attempt(guard: Found[Usage]) -> None:
            usage = await self._usage(guard.value, tenant, entry.key, instance)
            writes: list[Write] = [
                *(Delete(each.key) for each in (*reserved, *snapshots)),
                *(kind.delete(tenant, name) for kind in (INSTANCES, STATUS, EVENTS)),
                USAGE.put(usage, tenant),
                await ledger_with(store, tenant, usage, used),
                *([ACCOUNTS.delete(tenant, instance)] if instance else []),
            ]
            compares = [Compare(USAGE.key(tenant), guard.revision), Compare(entry.key, entry.revision)]
            await store.transact(compares, writes)

        async with self.lifecycle.accounts.closing(tenant, instance or "") as used:
            await guarded(store, tenant, attempt)
        for kind in {each.key.rpartition("/")[0].removeprefix("/claims/") for each in reserved}:
            self.context.allocators.of(kind).invalidate()

    async def _usage(self, before: Usage, tenant: str, key: str, gone: str | None) -> Usage:
        """The usage of the tenant's other instances. While more are damaged it is `before` less one instance."""
        snapshot = await self.context.store.list(INSTANCES.prefix(tenant))
        good, bad = INSTANCES.sort_out(entry for entry in snapshot.entries if entry.key != key)
        if bad:
            return subtract(before, Usage(instances=1))
        snapshots = SNAPSHOTS.sort_out((await self.context.store.list(SNAPSHOTS.prefix(tenant))).entries)[0]
        usage = of_instances(found.value for found in good)
        usage = total(usage, of_snapshots(each.value for each in snapshots if each.value.instance != gone))
        return msgspec.structs.replace(before, **{name: getattr(usage, name) for name in OF_INSTANCES})

    async def _discard(self, instance: str) -> None:
        """Discard the remains of an instance of unknown kind. Drivers that don't know it do nothing."""
        for driver in self.context.drivers.values():
            await driver.discard_stray(instance)
            gone = await self.lifecycle.remove_directory(driver, instance)
            if gone and (project := (await reserved_projects(self.context)).get(instance)):
                await release_project(self.context, project, instance)

    async def _sweep(self, owner: Tenant) -> None:
        """Remove directories and containers that belong to no instance. All records must be readable."""
        store = self.context.store
        # list directories before the store: an instance is stored, or being admitted, before its directory is made
        there = await asyncio.to_thread(os.listdir, self.context.settings.instances)
        known = {id_of(entry) for entry in (await store.list(INSTANCES.prefix_all())).entries}
        for instance in set(there) - known - self.controller.admitting:
            await self._discard(instance)
        await self.lifecycle.ports.networks.converged(owner.name)


def id_of(entry: Entry) -> str | None:
    """The id in an instance's record, even if the rest can't be decoded; None if there is none."""
    try:
        found = json.loads(entry.value)
        return match[0] if (match := _ID.fullmatch(str(found["id"]))) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _view(tenant: str, name: str) -> InstanceView:
    """A view of a damaged instance: failed, with only its name known."""
    return InstanceView(
        instance=Instance(
            tenant=tenant,
            name=name,
            id="",
            spec=InstanceSpec(name=name, image="?"),
            image_digest="",
            host="",
            root=OverlayRoot(layers=[]),
            config=ImageConfig(),
            wanted="stopped",
            created=0.0,
        ),
        status=InstanceStatus(
            state="failed", error="its record is damaged", hint=f"{cli_command(tenant, f'rm -f {name}')} removes it"
        ),
    )
