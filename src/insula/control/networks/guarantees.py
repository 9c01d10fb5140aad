"""Guarantees: set, look at, clear.

Every change rewrites the guard of all floors, and compares its revision: so what two concurrent requests, also
of two daemons, promise together is checked as well (admission.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from insula.control.allocation.transaction import retried
from insula.control.context import Context
from insula.control.instances.specs import cli_command
from insula.control.keys import FLOOR_GUARDS, GUARANTEES, INSTANCES, TENANTS
from insula.control.networks.admission import Capacity, check_admitted, measured_capacity
from insula.control.networks.controller import NetworkController
from insula.control.networks.shaping import kinds_of_floors
from insula.control.tenants import Tenants
from insula.model import rules
from insula.model.errors import Conflict, InsulaError, Invalid, NotFound
from insula.model.guarantees import VALUES, FloorGuard, Guarantee, GuaranteePatch, GuaranteeView
from insula.model.objects import Instance, Tenant
from insula.model.units import check_label
from insula.store.protocol import Compare, Write
from insula.store.typed import Found

WHOLE = "_"
"""The ID, in keys, of a tenant as a whole."""
ALL = "_"
"""The name, in keys, of the guard of all floors."""
_MOST = 30_000  # instances with a guarantee on one host
_BOUNDS = {
    "floor_out": (rules.MIN_BANDWIDTH, rules.MAX_BANDWIDTH, "bits a second"),
    "floor_in": (rules.MIN_BANDWIDTH, rules.MAX_BANDWIDTH, "bits a second"),
    "ceiling_out": (rules.MIN_BANDWIDTH, rules.MAX_BANDWIDTH, "bits a second"),
    "ceiling_in": (rules.MIN_BANDWIDTH, rules.MAX_BANDWIDTH, "bits a second"),
    "packets_out": (rules.MIN_PACKETS, rules.MAX_PACKETS, "packets a second"),
    "packets_in": (rules.MIN_PACKETS, rules.MAX_PACKETS, "packets a second"),
    "cpus": (rules.MIN_CPUS, rules.MAX_CPUS, "CPUs"),
    "memory": (rules.MIN_MEMORY, rules.MAX_BYTES, "bytes of memory"),
}


class Guarantees:
    def __init__(self, context: Context, tenants: Tenants, controller: NetworkController) -> None:
        self.context = context
        self.tenants = tenants
        self.controller = controller
        self._changing = asyncio.Lock()

    async def list(self, tenant: str) -> list[GuaranteeView]:
        """The tenant's guarantee, then those of its instances by name."""
        await self.tenants.find(tenant)
        names = {instance.id: instance.name for instance in await INSTANCES.readable(self.context.store, tenant)}
        views = []
        for each in await GUARANTEES.readable(self.context.store, tenant):
            if each.instance is None or each.instance in names:
                views.append(_view(each, names.get(each.instance or "")))
        return sorted(views, key=lambda view: (view.instance is not None, view.instance or ""))

    async def get(self, tenant: str, instance: str | None = None) -> GuaranteeView:
        """The guarantee of a tenant, or of an instance. NotFound."""
        return _view((await self.find(tenant, instance)).value, instance)

    async def find(self, tenant: str, instance: str | None = None) -> Found[Guarantee]:
        """The guarantee and its revision. NotFound."""
        owner = (await self.tenants.find(tenant)).value
        id_ = WHOLE if instance is None else (await self._instance(owner, instance)).value.id
        if found := await GUARANTEES.get(self.context.store, tenant, id_):
            return found
        who = f"tenant {tenant}" if instance is None else f"instance {instance}"
        raise NotFound(f"{who} has no guarantee", f"{cli_command(tenant, 'guarantee set')} sets one")

    async def _instance(self, tenant: Tenant, name: str) -> Found[Instance]:
        found = await INSTANCES.get(self.context.store, tenant.name, check_label("instance", name))
        if found is None:
            hint = f"{cli_command(tenant.name, 'ps -a')} lists them"
            raise NotFound(f"tenant {tenant.name} has no instance {name}", hint)
        return found

    async def set(self, tenant: str, patch: GuaranteePatch, instance: str | None = None) -> GuaranteeView:
        """Change the guarantee of a tenant or of an instance, and wait until it is in force. Invalid, NotFound,
        Conflict if that would promise more than there is; Failed changes nothing."""
        changes = _checked(patch, instance)
        capacity = await asyncio.to_thread(measured_capacity, self.context.settings.network.link_bits)
        return await self._change(tenant, instance, changes, capacity)

    async def clear(self, tenant: str, instance: str | None = None) -> None:
        """Remove the guarantee of a tenant or of an instance. NotFound, Conflict while instances need it."""
        await self.find(tenant, instance)
        capacity = await asyncio.to_thread(measured_capacity, self.context.settings.network.link_bits)
        await self._change(tenant, instance, dict.fromkeys(VALUES), capacity)

    async def _change(
        self, tenant: str, instance: str | None, changes: dict[str, object], capacity: Capacity
    ) -> GuaranteeView:
        async with self._changing:
            before, after, everybody = await self._commit(tenant, instance, changes, capacity)
            try:
                await self._installed(tenant, everybody=everybody)
            except BaseException:
                with contextlib.suppress(InsulaError):  # it was removed meanwhile
                    await self._restore(before, after)
                    await self._installed(tenant, everybody=everybody)
                raise
        return _view(after, instance)

    async def _commit(
        self, tenant: str, instance: str | None, changes: dict[str, object], capacity: Capacity
    ) -> tuple[Guarantee | None, Guarantee, bool]:
        """Store the change. Return the guarantee before and after it, and whether it concerns all tenants."""
        store = self.context.store

        async def attempt() -> tuple[Guarantee | None, Guarantee, bool]:
            guard = await FLOOR_GUARDS.get(store, ALL) or Found(FloorGuard(), 0)
            every = await GUARANTEES.list(store)
            owner = await self.tenants.find(tenant)
            compares = [FLOOR_GUARDS.unchanged(guard, ALL), TENANTS.unchanged(owner, tenant)]
            living = {each.id for each in await INSTANCES.readable(store, tenant)}
            target = None
            if instance is not None:
                target = (await self._instance(owner.value, instance)).value.id
            gone = [each for each in every if each.tenant == tenant and each.instance and each.instance not in living]
            others = [e for e in every if (e.tenant, e.instance) != (tenant, target) and e not in gone]
            before = next((e for e in every if (e.tenant, e.instance) == (tenant, target)), None)
            after = msgspec.structs.replace(before or _new(tenant, target, every), **changes)
            check_admitted(after, others, owner.value.limits, capacity)
            writes = [_put(after), *map(_delete, gone), _next(guard)]
            await store.transact(compares, writes)
            return before, after, kinds_of_floors(every) != kinds_of_floors([*others, after])

        return await retried(attempt)

    async def _restore(self, before: Guarantee | None, after: Guarantee) -> None:
        store = self.context.store

        async def attempt() -> None:
            guard = await FLOOR_GUARDS.get(store, ALL) or Found(FloorGuard(), 0)
            compares: list[Compare] = [FLOOR_GUARDS.unchanged(guard, ALL)]
            await store.transact(compares, [_put(before) if before else _delete(after), _next(guard)])

        await retried(attempt)

    async def _installed(self, tenant: str, *, everybody: bool) -> None:
        """Return when the controller has installed the change on this host. Raises what prevents it.

        The first floor of a tenant needs the packets of all others to be shaped, too."""
        names = {tenant}
        if everybody:
            names |= {each.name for each in await TENANTS.readable(self.context.store)}
        found = await asyncio.gather(*map(self.controller.converged, names), return_exceptions=True)
        errors = dict(zip(names, found, strict=True))
        own = errors[tenant]
        if isinstance(own, BaseException):
            raise own
        for part in ("all", "guarantees", "limits"):
            if error := own.get(part):
                raise error


def _checked(patch: GuaranteePatch, instance: str | None) -> dict[str, object]:
    """The fields of a patch that are there. Invalid if one is out of bounds, or if there is none."""
    changes = {name: value for name in VALUES if (value := getattr(patch, name)) is not UNSET}
    if not changes:
        raise Invalid("there is nothing to set", "give --out, --in, --cpu, --memory or another option")
    check_values(changes, instance)
    return changes


def check_values(changes: Mapping[str, Any], instance: str | None) -> None:
    """Check values of a guarantee by their names. Invalid if one is out of bounds."""
    for name, value in changes.items():
        least, most, unit = _BOUNDS[name]
        if value is not None and not least <= value <= most:
            raise Invalid(f"{value} {unit} can't be guaranteed or a ceiling", f"use {least} to {most}")
        if value is not None and instance is None and name.startswith("packets_"):
            raise Invalid("packets a second are limited for instances only", "name an instance")


def _new(tenant: str, instance: str | None, every: Iterable[Guarantee]) -> Guarantee:
    """A guarantee that promises nothing yet. An instance's gets the lowest free number."""
    number = None
    if instance is not None:
        taken = {each.number for each in every}
        number = next((n for n in range(_MOST) if n not in taken), None)
        if number is None:
            raise Conflict(f"{_MOST} instances have guarantees", "clear those that are not needed")
    return Guarantee(tenant=tenant, instance=instance, number=number, created=time.time())


def _empty(guarantee: Guarantee) -> bool:
    return all(getattr(guarantee, name) is None for name in VALUES)


def _put(guarantee: Guarantee) -> Write:
    """The write that stores a guarantee; one that says nothing is deleted."""
    if _empty(guarantee):
        return _delete(guarantee)
    return GUARANTEES.put(guarantee, guarantee.tenant, guarantee.instance or WHOLE)


def _delete(guarantee: Guarantee) -> Write:
    return GUARANTEES.delete(guarantee.tenant, guarantee.instance or WHOLE)


def _next(guard: Found[FloorGuard]) -> Write:
    return FLOOR_GUARDS.put(FloorGuard(changes=guard.value.changes + 1), ALL)


def _view(guarantee: Guarantee, instance: str | None) -> GuaranteeView:
    values = {name: getattr(guarantee, name) for name in VALUES}
    return GuaranteeView(tenant=guarantee.tenant, instance=instance, created=guarantee.created, **values)
