"""Floating addresses: allocate, attach, detach, remove (that is, release).

An address is reserved for one tenant. While it is attached it claims all its ports (external.py), so that nothing else
leads there. Every change rewrites the tenant's guard (allocation/quotas.py), as the removal of an instance does: so an
address is never attached to an instance that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Final

import msgspec

from insula.control.allocation.quotas import add, subtract
from insula.control.allocation.reservations import Reservation
from insula.control.allocation.transaction import Proposal, allocate, guard, retried, turn
from insula.control.context import Context
from insula.control.instances.specs import check_labels, cli_command
from insula.control.keys import EXTERNAL, FLOATING_IPS, INSTANCES, TENANTS, USAGE
from insula.control.networks.controller import NetworkController
from insula.control.networks.external import External, all_ports
from insula.control.networks.floating_views import view_of
from insula.control.tenants import Tenants
from insula.model.errors import Conflict, InsulaError, Invalid, NotFound
from insula.model.external import ExternalClaim
from insula.model.floating_ips import FloatingIp, FloatingIpPatch, FloatingIpSpec, FloatingIpView
from insula.model.units import check_label
from insula.model.views import Usage
from insula.network import pool
from insula.store.protocol import Compare, Delete, Write
from insula.store.typed import Found

KIND: Final = "floating-ip"
"""The kind of the reservation of an address."""
FloatingChange = Callable[[Found[Usage]], Awaitable[FloatingIp | None]]


class FloatingIps:
    def __init__(self, context: Context, tenants: Tenants, controller: NetworkController) -> None:
        self.context = context
        self.tenants = tenants
        self.controller = controller
        self.external = External(context)

    async def find(self, tenant: str, name: str) -> Found[FloatingIp]:
        """The floating address and its revision, or NotFound."""
        check_label("tenant", tenant)
        if found := await FLOATING_IPS.get(self.context.store, tenant, check_label("floating address", name)):
            return found
        await self.tenants.find(tenant)
        ls = cli_command(tenant, "floating-ip ls")
        raise NotFound(f"tenant {tenant} has no floating address {name}", f"{ls} lists them")

    async def get(self, tenant: str, name: str) -> FloatingIpView:
        found = (await self.find(tenant, name)).value
        return view_of(found, await INSTANCES.readable(self.context.store, tenant))

    async def list(self, tenant: str) -> list[FloatingIpView]:
        await self.tenants.find(tenant)
        instances = await INSTANCES.readable(self.context.store, tenant)
        return [view_of(each, instances) for each in await FLOATING_IPS.readable(self.context.store, tenant)]

    async def allocate(self, tenant: str, spec: FloatingIpSpec) -> FloatingIpView:
        """Reserve an address for the tenant, and attach it if the spec names an instance. Invalid, NotFound, Conflict,
        QuotaExceeded; Failed changes nothing."""
        if spec.name:
            check_label("floating address", spec.name)
        check_labels(spec.labels)
        _check_network(spec.instance, spec.network)
        owner = await self.tenants.find(tenant)
        store, allocators = self.context.store, self.context.allocators
        hosts = (await asyncio.to_thread(self.context.fabric.outside_view)).addresses
        ranges = self.context.settings.network.floating

        def pick(taken: set[str]) -> str:
            used = taken | {*hosts}
            if spec.address is not None:
                return pool.check(ranges, used, spec.address)
            return pool.choose(ranges, used, 6 if spec.family == "ipv6" else 4)

        async def propose() -> Proposal[FloatingIp]:
            usage = await guard(store, tenant)
            rest = add(owner.value, usage.value, Usage(floating_ips=1))
            name = spec.name or await self._free_name(tenant)
            if await FLOATING_IPS.get(store, tenant, name):
                raise Conflict(f"tenant {tenant} has a floating address {name} already", "choose another name")
            made = FloatingIp(
                tenant=tenant,
                name=name,
                address=await allocators.of(KIND).choose(pick),
                labels=spec.labels,
                created=time.time(),
            )
            compares = [
                TENANTS.unchanged(owner, tenant),
                USAGE.unchanged(usage, tenant),
                FLOATING_IPS.absent(tenant, name),
            ]
            writes = [FLOATING_IPS.put(made, tenant, name), USAGE.put(rest, tenant)]
            return Proposal(made, [reservation(made)], compares, writes)

        def refuse(key: str, _: FloatingIp) -> None:
            if key == TENANTS.key(tenant):
                raise Conflict(f"tenant {tenant} was changed at the same time", "try again")

        async with turn(store, tenant):
            made = (await allocate(store, allocators, propose, refuse)).value
        try:
            if spec.instance is not None:
                patch = FloatingIpPatch(instance=spec.instance, network=spec.network)
                return await self.update(tenant, made.name, patch)
            await self._installed(tenant)
        except BaseException:
            await self._delete(tenant, made.name)
            raise
        return await self.get(tenant, made.name)

    async def _free_name(self, tenant: str) -> str:
        entries = (await self.context.store.list(FLOATING_IPS.prefix(tenant))).entries
        taken = {FLOATING_IPS.parts(entry.key)[1] for entry in entries}
        return next(name for name in (f"ip{number}" for number in count(1)) if name not in taken)

    async def update(self, tenant: str, name: str, patch: FloatingIpPatch) -> FloatingIpView:
        """Attach the address to an instance, also if it was attached to another, or detach it. Open connections with
        the old one are cut. Invalid, NotFound, Conflict; Failed changes nothing."""
        if isinstance(instance := patch.instance, msgspec.UnsetType):
            raise Invalid("there is nothing to change", "name an instance, or detach it")
        _check_network(instance, patch.network)
        before: FloatingIp | None = None

        async def attempt(usage: Found[Usage]) -> FloatingIp:
            nonlocal before
            found = await self.find(tenant, name)
            before = found.value
            after, compares, writes = await self._attached(found.value, instance, patch.network)
            await self._commit(usage, found, after, compares, writes)
            return after

        async def undo(usage: Found[Usage]) -> FloatingIp | None:
            found = await FLOATING_IPS.get(self.context.store, tenant, name)
            if found is None or before is None:
                return None
            now = _without_instance(found.value)
            await self._commit(usage, found, now, [], _unclaimed(found.value))
            return now

        await self._changed(tenant, attempt)
        try:
            await self._installed(tenant)
        except BaseException:
            with contextlib.suppress(InsulaError):
                await self._changed(tenant, undo)
                await self.controller.converged(tenant)
            raise
        return await self.get(tenant, name)

    async def relabel(self, tenant: str, name: str, labels: dict[str, str]) -> None:
        """Replace the labels. Invalid, NotFound."""
        check_labels(labels)

        async def attempt(usage: Found[Usage]) -> FloatingIp:
            found = await self.find(tenant, name)
            after = msgspec.structs.replace(found.value, labels=labels)
            await self._commit(usage, found, after, [], [])
            return after

        await self._changed(tenant, attempt)

    # -- the replacement of an instance ------------------------------------------------------------------------------

    async def keep(self, tenant: str, instance: str) -> None:
        """Note that this instance is going to be removed and created again, for all addresses that are attached to it:
        so they come to the new one also if insulad ends in between."""
        await self._note(tenant, instance, instance)

    async def kept(self, tenant: str) -> set[str]:
        """Return the names of the instances for which addresses are kept."""
        return {each.kept_for for each in await FLOATING_IPS.readable(self.context.store, tenant) if each.kept_for}

    async def give_back(self, tenant: str, instance: str) -> None:
        """Attach the addresses that were kept for an instance of this name to the one that is there now."""
        store = self.context.store
        found = await INSTANCES.get(store, tenant, instance)
        for each in await FLOATING_IPS.readable(store, tenant):
            if found and each.kept_for == instance and each.instance != found.value.id:
                await self.update(tenant, each.name, FloatingIpPatch(instance=instance, network=each.network))
        await self._note(tenant, instance, None)

    async def _note(self, tenant: str, instance: str, kept_for: str | None) -> None:
        """Set `kept_for` of the addresses that are attached to an instance, where it differs."""
        found = await INSTANCES.get(self.context.store, tenant, instance)
        for each in await FLOATING_IPS.readable(self.context.store, tenant):
            if found is None or each.instance != found.value.id or each.kept_for == kept_for:
                continue

            async def attempt(usage: Found[Usage], each: FloatingIp = each) -> FloatingIp:
                now = await self.find(tenant, each.name)
                after = msgspec.structs.replace(now.value, kept_for=kept_for)
                await self._commit(usage, now, after if now.value.instance == each.instance else now.value, [], [])
                return after

            await self._changed(tenant, attempt)

    async def remove(self, tenant: str, name: str) -> None:
        """Release an address; it is detached first. Conflict while published ports or load balancers use it."""
        await self.find(tenant, name)
        await self._delete(tenant, name)

    async def _delete(self, tenant: str, name: str) -> None:
        async def attempt(usage: Found[Usage]) -> FloatingIp | None:
            found = await FLOATING_IPS.get(self.context.store, tenant, name)
            if found is None:
                return None
            address = found.value.address
            unchanged = await self.external.guard()
            users = [each for each in await self.external.users(address) if each.kind != KIND]
            if users:
                names = ", ".join(sorted({f"{each.kind} {each.name}" for each in users})[:3])
                raise Conflict(
                    f"floating address {name} is used by {names}",
                    "withdraw the ports, or remove the load balancer, first",
                )
            await self.context.store.transact(
                [unchanged, USAGE.unchanged(usage, tenant), FLOATING_IPS.unchanged(found, tenant, name)],
                [
                    FLOATING_IPS.delete(tenant, name),
                    USAGE.put(subtract(usage.value, Usage(floating_ips=1)), tenant),
                    reservation(found.value).delete(),
                    *_unclaimed(found.value),
                ],
            )
            return found.value

        if (gone := await self._changed(tenant, attempt)) is None:
            return
        with contextlib.suppress(InsulaError):  # the tenant was removed, or everything is being taken down
            await self.controller.converged(tenant)
        self.context.allocators.release([reservation(gone)])

    # -- transactions ------------------------------------------------------------------------------------------------

    async def _changed(self, tenant: str, attempt: FloatingChange) -> FloatingIp | None:
        """Call `attempt` with the tenant's guard until its transaction succeeds."""

        async def with_guard() -> FloatingIp | None:
            return await attempt(await guard(self.context.store, tenant))

        async with turn(self.context.store, tenant):
            return await retried(with_guard)

    async def _commit(
        self,
        usage: Found[Usage],
        found: Found[FloatingIp],
        after: FloatingIp,
        compares: Sequence[Compare],
        writes: Sequence[Write],
    ) -> None:
        tenant, name = after.tenant, after.name
        await self.context.store.transact(
            [*compares, USAGE.unchanged(usage, tenant), FLOATING_IPS.unchanged(found, tenant, name)],
            [*writes, USAGE.put(usage.value, tenant), FLOATING_IPS.put(after, tenant, name)],
        )

    async def _attached(
        self, floating: FloatingIp, instance: str | None, network: str | None
    ) -> tuple[FloatingIp, Sequence[Compare], Sequence[Write]]:
        """The address attached to that instance, or detached, and the parts of the transaction that make it so.
        NotFound, Invalid, Conflict."""
        store, tenant = self.context.store, floating.tenant
        if instance is None:
            return _without_instance(floating), [], [*_unclaimed(floating)]
        found = await INSTANCES.get(store, tenant, check_label("instance", instance))
        if found is None:
            ps = cli_command(tenant, "ps -a")
            raise NotFound(f"tenant {tenant} has no instance {instance}", f"{ps} lists them")
        after = msgspec.structs.replace(floating, instance=found.value.id, network=network, kept_for=None)
        seen = view_of(after, [found.value])
        if seen.target is None:
            raise Invalid(f"{floating.address} can't be attached: {seen.reason}", "see `insula port ls`")
        for other in await FLOATING_IPS.list(store, tenant):
            if other.name != floating.name and view_of(other, [found.value]).target == seen.target:
                what = f"{seen.target} of instance {instance} has the floating address {other.name} already"
                raise Conflict(what, f"detach {other.name} first")
        owner = ExternalClaim(tenant=tenant, kind=KIND, name=floating.name, id=floating.name)
        ports = all_ports(floating.address)
        claims = await self.external.plan(owner, ports, ports if floating.instance else ())
        return after, [INSTANCES.unchanged(found, tenant, instance), *claims.compares], [*claims.writes]

    async def _installed(self, tenant: str) -> None:
        """Return when the controller has installed the tenant's addresses. Raises what prevents it."""
        errors = await self.controller.converged(tenant)
        if error := errors.get("all") or errors.get("outside"):
            raise error


def detached(floating: Sequence[FloatingIp], instance: str) -> list[Write]:
    """The writes that detach all addresses of the instance with this ID."""
    found: list[Write] = []
    for each in floating:
        if each.instance == instance:
            now = msgspec.structs.replace(each, instance=None) if each.kept_for else _without_instance(each)
            found += [FLOATING_IPS.put(now, each.tenant, each.name), *_unclaimed(each)]
    return found


def _without_instance(floating: FloatingIp) -> FloatingIp:
    return msgspec.structs.replace(floating, instance=None, network=None, kept_for=None)


def reservation(floating: FloatingIp) -> Reservation:
    return Reservation(KIND, floating.address, f"{floating.tenant}/{floating.name}")


def _unclaimed(floating: FloatingIp) -> Sequence[Delete]:
    """The writes that release the ports of an address that was attached."""
    return [EXTERNAL.delete(*each.parts) for each in all_ports(floating.address)] if floating.instance else []


def _check_network(instance: str | None, network: str | None) -> None:
    if network is not None:
        check_label("network", network)
        if instance is None:
            raise Invalid("a network was given without an instance", "name the instance that is on it")
