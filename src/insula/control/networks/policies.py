"""Policies: create, look at, change, remove.

A change is committed and then brought into force on this host, for open connections too. If that fails, the change is
taken back: after an error nothing has changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec
from msgspec import UNSET

from insula.control.allocation.quotas import add, subtract
from insula.control.allocation.transaction import guarded
from insula.control.context import Context
from insula.control.instances.specs import check_labels, cli_command
from insula.control.keys import ADDRESS_GROUPS, NETWORKS, POLICIES, TENANTS, USAGE
from insula.control.networks.effective import audited_flows, effective, selected
from insula.control.networks.enforcement import Enforcement
from insula.control.networks.policy_checks import check_directions, check_rules, check_selector
from insula.control.tenants import Tenants
from insula.model.errors import Conflict, Invalid, NotFound
from insula.model.policies import Direction, GroupPeer, InstancePeer, Policy, PolicyRule, Selector
from insula.model.policy_views import EffectivePolicies, PolicyPatch, PolicySpec, PolicyView
from insula.model.units import check_label
from insula.model.views import Usage
from insula.store.typed import Found

Changed = Callable[[Policy], Policy]


class Policies:
    def __init__(self, context: Context, tenants: Tenants, enforcement: Enforcement) -> None:
        self.context = context
        self.tenants = tenants
        self.enforcement = enforcement

    # -- looking ---------------------------------------------------------------------------------------------------

    async def find(self, tenant: str, name: str) -> Found[Policy]:
        """The policy and its revision, or NotFound."""
        check_label("tenant", tenant)
        if found := await POLICIES.get(self.context.store, tenant, check_label("policy", name)):
            return found
        await self.tenants.find(tenant)
        raise NotFound(f"tenant {tenant} has no policy {name}", f"{cli_command(tenant, 'policy ls')} lists them")

    async def get(self, tenant: str, name: str) -> PolicyView:
        """The policy, whom it selects, and what it would have denied if it is in audit."""
        policy = (await self.find(tenant, name)).value
        view = await self._view(policy)
        if not policy.audit:
            return view
        owner = (await self.tenants.find(tenant)).value
        counted = await self.context.fabric_call(tenant, self.context.fabric.audited, owner)
        intent = await self.enforcement.intents.judging(tenant)
        return msgspec.structs.replace(view, audited=audited_flows(intent, policy, counted))

    async def list(self, tenant: str) -> list[PolicyView]:
        await self.tenants.find(tenant)
        labels = self.enforcement.intents.labels(tenant)
        policies = await POLICIES.readable(self.context.store, tenant)
        return [PolicyView(policy=policy, selects=selected(policy, labels)) for policy in policies]

    async def _view(self, policy: Policy) -> PolicyView:
        return PolicyView(policy=policy, selects=selected(policy, self.enforcement.intents.labels(policy.tenant)))

    async def effective(self, tenant: str, instance: str) -> EffectivePolicies:
        """All that applies to an instance on this host. NotFound."""
        owner = (await self.tenants.find(tenant)).value
        if check_label("instance", instance) not in self.enforcement.intents.labels(tenant):
            raise NotFound(f"tenant {tenant} has no instance {instance}", f"{cli_command(tenant, 'ps -a')} lists them")
        _, policy = await self.enforcement.intents.policy(tenant)
        try:
            leases = await asyncio.to_thread(self.context.fabric.leases, owner)
        except NotFound:  # the tenant's namespace is not there yet
            leases = []
        return effective(owner.name, instance, policy, leases)

    # -- changing --------------------------------------------------------------------------------------------------

    async def create(self, tenant: str, spec: PolicySpec) -> PolicyView:
        """Create a policy. When this returns, it is in force. Invalid, Conflict, NotFound; Failed changes nothing."""
        directions = check_directions(spec.directions)
        policy = Policy(
            tenant=tenant,
            name=check_label("policy", spec.name),
            select=check_selector(spec.select),
            directions=directions,
            rules=check_rules(spec.rules, directions),
            audit=spec.audit,
            dns=_check_dns(spec.dns, directions),
            labels=check_labels(spec.labels),
            created=time.time(),
        )

        async def attempt(guard: Found[Usage]) -> None:
            owner = await self.tenants.find(tenant)
            if await POLICIES.get(self.context.store, tenant, policy.name):
                raise Conflict(f"tenant {tenant} has a policy {policy.name} already", "choose another name")
            rest = add(owner.value, guard.value, Usage(policies=1))
            await self._check_references(policy)
            await self.context.store.transact(
                [
                    TENANTS.unchanged(owner, tenant),
                    USAGE.unchanged(guard, tenant),
                    POLICIES.absent(tenant, policy.name),
                ],
                [POLICIES.put(policy, tenant, policy.name), USAGE.put(rest, tenant)],
            )

        await self.tenants.find(tenant)
        await guarded(self.context.store, tenant, attempt)
        await self.enforcement.enforced(tenant, lambda: self._delete(tenant, policy.name))
        return await self._view(policy)

    async def update(self, tenant: str, name: str, patch: PolicyPatch) -> PolicyView:
        """Change a policy: all or nothing. Invalid, NotFound; Failed changes nothing."""
        if patch == PolicyPatch():
            raise Invalid("there is nothing to change", "give a rule to add, or another part of the policy")

        def changed(policy: Policy) -> Policy:
            select: Selector = policy.select if patch.select is UNSET else patch.select
            directions: Sequence[Direction] = policy.directions if patch.directions is UNSET else patch.directions
            directions = check_directions(directions)
            audit: bool = policy.audit if patch.audit is UNSET else patch.audit
            dns: bool = policy.dns if patch.dns is UNSET else patch.dns
            return msgspec.structs.replace(
                policy,
                select=check_selector(select),
                directions=directions,
                rules=check_rules(_patched(policy, patch), directions),
                audit=audit,
                dns=_check_dns(dns, directions),
            )

        return await self._change(tenant, name, changed)

    async def replace(self, tenant: str, name: str, spec: PolicySpec) -> PolicyView:
        """Replace all that can be changed. Invalid, NotFound; Failed changes nothing."""
        directions = check_directions(spec.directions)
        new = {
            "select": check_selector(spec.select),
            "directions": directions,
            "rules": check_rules(spec.rules, directions),
            "audit": spec.audit,
            "dns": _check_dns(spec.dns, directions),
            "labels": check_labels(spec.labels),
        }
        return await self._change(tenant, name, lambda policy: msgspec.structs.replace(policy, **new))

    async def _change(self, tenant: str, name: str, changed: Changed) -> PolicyView:
        before, after = await self._commit(tenant, name, changed)
        await self.enforcement.enforced(tenant, lambda: self._commit(tenant, name, lambda _: before))
        return await self._view(after)

    async def _commit(self, tenant: str, name: str, changed: Changed) -> tuple[Policy, Policy]:
        async def attempt(guard: Found[Usage]) -> tuple[Policy, Policy]:
            found = await self.find(tenant, name)
            policy = changed(found.value)
            await self._check_references(policy)
            await self.context.store.transact(
                [USAGE.unchanged(guard, tenant), POLICIES.unchanged(found, tenant, name)],
                [POLICIES.put(policy, tenant, name), USAGE.put(guard.value, tenant)],
            )
            return found.value, policy

        return await guarded(self.context.store, tenant, attempt)

    async def _check_references(self, policy: Policy) -> None:
        """Check that networks and groups of a policy exist. NotFound."""
        store, tenant = self.context.store, policy.tenant
        peers = [peer for rule in policy.rules for peer in rule.peers]
        for group in dict.fromkeys(peer.group for peer in peers if isinstance(peer, GroupPeer)):
            if await ADDRESS_GROUPS.get(store, tenant, group) is None:
                ls = cli_command(tenant, "group ls")
                raise NotFound(f"tenant {tenant} has no address group {group}", f"{ls} lists them")
        for network in dict.fromkeys(peer.network for peer in peers if isinstance(peer, InstancePeer)):
            if network is not None and await NETWORKS.get(store, tenant, network) is None:
                ls = cli_command(tenant, "network ls")
                raise NotFound(f"tenant {tenant} has no network {network}", f"{ls} lists them")

    async def remove(self, tenant: str, name: str) -> None:
        """Remove a policy. When this returns, it is no longer in force; Failed changes nothing."""
        policy = (await self.find(tenant, name)).value
        await self._delete(tenant, name)
        await self.enforcement.enforced(tenant, lambda: self._restore(policy))

    async def _delete(self, tenant: str, name: str) -> None:
        async def attempt(guard: Found[Usage]) -> None:
            found = await POLICIES.get(self.context.store, tenant, name)
            if found is None:
                return
            rest = subtract(guard.value, Usage(policies=1))
            await self.context.store.transact(
                [USAGE.unchanged(guard, tenant), POLICIES.unchanged(found, tenant, name)],
                [POLICIES.delete(tenant, name), USAGE.put(rest, tenant)],
            )

        await guarded(self.context.store, tenant, attempt)

    async def _restore(self, policy: Policy) -> None:
        """Put a policy back whose removal has failed. Conflict if there is another one of its name."""

        async def attempt(guard: Found[Usage]) -> None:
            owner = await self.tenants.find(policy.tenant)
            rest = add(owner.value, guard.value, Usage(policies=1))
            await self.context.store.transact(
                [USAGE.unchanged(guard, policy.tenant), POLICIES.absent(policy.tenant, policy.name)],
                [POLICIES.put(policy, policy.tenant, policy.name), USAGE.put(rest, policy.tenant)],
            )

        await guarded(self.context.store, policy.tenant, attempt)


def _check_dns(dns: bool, directions: Sequence[Direction]) -> bool:
    if not dns and "out" not in directions:
        raise Invalid("a policy of direction in says nothing about DNS", "leave --no-dns out, or add --out")
    return dns


def _patched(policy: Policy, patch: PolicyPatch) -> list[PolicyRule]:
    """The rules after a patch. NotFound if one that is to be removed is not there."""
    both: tuple[Direction, ...] = ("in", "out")
    now: Sequence[PolicyRule] = policy.rules if patch.rules is UNSET else patch.rules
    removed, found = check_rules(patch.remove_rules, both), check_rules(now, both)
    for rule in removed:
        if rule not in found:
            raise NotFound(f"policy {policy.name} does not have the rule that is to be removed", "see `policy show`")
    return [*(rule for rule in found if rule not in removed), *patch.add_rules]
