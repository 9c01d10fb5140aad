"""Address groups: create, look at, change, remove."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from insula.control.allocation.quotas import add, subtract
from insula.control.allocation.transaction import guarded
from insula.control.context import Context
from insula.control.instances.specs import check_labels, cli_command
from insula.control.keys import ADDRESS_GROUPS, POLICIES, TENANTS, USAGE
from insula.control.networks.enforcement import Enforcement
from insula.control.networks.policy_checks import check_cidrs
from insula.control.tenants import Tenants
from insula.model.errors import Conflict, Invalid, NotFound
from insula.model.policies import AddressGroup, GroupPeer
from insula.model.policy_views import AddressGroupPatch
from insula.model.units import check_label
from insula.model.views import Usage
from insula.store.typed import Found


class AddressGroups:
    def __init__(self, context: Context, tenants: Tenants, enforcement: Enforcement) -> None:
        self.context = context
        self.tenants = tenants
        self.enforcement = enforcement

    async def find(self, tenant: str, name: str) -> Found[AddressGroup]:
        """The group and its revision, or NotFound."""
        check_label("tenant", tenant)
        if found := await ADDRESS_GROUPS.get(self.context.store, tenant, check_label("group", name)):
            return found
        await self.tenants.find(tenant)
        raise NotFound(f"tenant {tenant} has no address group {name}", f"{cli_command(tenant, 'group ls')} lists them")

    async def get(self, tenant: str, name: str) -> AddressGroup:
        return (await self.find(tenant, name)).value

    async def list(self, tenant: str) -> list[AddressGroup]:
        await self.tenants.find(tenant)
        return [*await ADDRESS_GROUPS.readable(self.context.store, tenant)]

    async def create(
        self, tenant: str, name: str, cidrs: Sequence[str], labels: dict[str, str] | None = None
    ) -> AddressGroup:
        """Create a group. Invalid, Conflict, NotFound."""
        group = AddressGroup(
            tenant=tenant,
            name=check_label("group", name),
            cidrs=check_cidrs(cidrs),
            labels=check_labels(labels or {}),
            created=time.time(),
        )

        async def attempt(guard: Found[Usage]) -> None:
            owner = await self.tenants.find(tenant)
            if await ADDRESS_GROUPS.get(self.context.store, tenant, name):
                raise Conflict(f"tenant {tenant} has an address group {name} already", "choose another name")
            rest = add(owner.value, guard.value, Usage(address_groups=1))
            await self.context.store.transact(
                [TENANTS.unchanged(owner, tenant), USAGE.unchanged(guard, tenant), ADDRESS_GROUPS.absent(tenant, name)],
                [ADDRESS_GROUPS.put(group, tenant, name), USAGE.put(rest, tenant)],
            )

        await self.tenants.find(tenant)
        await guarded(self.context.store, tenant, attempt)
        return group

    async def update(self, tenant: str, name: str, patch: AddressGroupPatch) -> AddressGroup:
        """Change the ranges. When this returns, the change is in force. Invalid, NotFound; Failed changes nothing."""
        added, removed = check_cidrs(patch.add), check_cidrs(patch.remove)
        replaced = check_cidrs(patch.cidrs) if patch.cidrs is not msgspec.UNSET else None
        if replaced is None and not (added or removed):
            raise Invalid("there is nothing to change", "give ranges to add or to remove")

        def changed(group: AddressGroup) -> AddressGroup:
            now = group.cidrs if replaced is None else replaced
            if missing := [each for each in removed if each not in now]:
                raise NotFound(f"group {name} does not have {missing[0]}", f"it has {', '.join(now[:5]) or 'nothing'}")
            return msgspec.structs.replace(group, cidrs=check_cidrs([*(c for c in now if c not in removed), *added]))

        return await self._change(tenant, name, changed)

    async def replace(self, tenant: str, name: str, cidrs: Sequence[str], labels: dict[str, str]) -> AddressGroup:
        """Replace all that can be changed. Invalid, NotFound; Failed changes nothing."""
        new = {"cidrs": check_cidrs(cidrs), "labels": check_labels(labels)}
        return await self._change(tenant, name, lambda group: msgspec.structs.replace(group, **new))

    async def _change(self, tenant: str, name: str, changed: Callable[[AddressGroup], AddressGroup]) -> AddressGroup:
        before, after = await self._commit(tenant, name, changed)
        await self.enforcement.enforced(tenant, lambda: self._commit(tenant, name, lambda _: before))
        return after

    async def _commit(
        self, tenant: str, name: str, changed: Callable[[AddressGroup], AddressGroup]
    ) -> tuple[AddressGroup, AddressGroup]:
        async def attempt(guard: Found[Usage]) -> tuple[AddressGroup, AddressGroup]:
            found = await self.find(tenant, name)
            group = changed(found.value)
            await self.context.store.transact(
                [USAGE.unchanged(guard, tenant), ADDRESS_GROUPS.unchanged(found, tenant, name)],
                [ADDRESS_GROUPS.put(group, tenant, name), USAGE.put(guard.value, tenant)],
            )
            return found.value, group

        return await guarded(self.context.store, tenant, attempt)

    async def remove(self, tenant: str, name: str) -> None:
        """Remove a group. Conflict while a policy refers to it."""

        async def attempt(guard: Found[Usage]) -> None:
            found = await self.find(tenant, name)
            policies = await POLICIES.list(self.context.store, tenant)
            peers = [(policy.name, peer) for policy in policies for rule in policy.rules for peer in rule.peers]
            users = dict.fromkeys(user for user, peer in peers if isinstance(peer, GroupPeer) and peer.group == name)
            if users:
                what = f"address group {name} is used by policy {', '.join([*users][:3])}"
                raise Conflict(what, "change or remove these policies first")
            await self.context.store.transact(
                [USAGE.unchanged(guard, tenant), ADDRESS_GROUPS.unchanged(found, tenant, name)],
                [
                    ADDRESS_GROUPS.delete(tenant, name),
                    USAGE.put(subtract(guard.value, Usage(address_groups=1)), tenant),
                ],
            )

        await guarded(self.context.store, tenant, attempt)
