"""Policies of the operator: create, change, look at, remove. They are above those of the tenants."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from msgspec import UnsetType

from insula.control.context import Context
from insula.control.instances.specs import check_labels
from insula.control.keys import OPERATOR_POLICIES, TENANTS
from insula.control.networks.enforcement import Enforcement
from insula.control.networks.policy_checks import check_operator_rules, check_selector
from insula.model.errors import Conflict, Failed, InsulaError, Invalid, NotFound
from insula.model.policies import OperatorPolicy
from insula.model.policy_views import OperatorPolicyPatch, OperatorPolicySpec
from insula.model.rules import MAX_PRIORITY
from insula.model.units import check_label
from insula.network.reference.policy_model import matches
from insula.store.protocol import TransactionConflict
from insula.store.typed import Found

MAX_POLICIES = 64
"""Policies of the operator: their rules are compiled together for each tenant."""


class OperatorPolicies:
    def __init__(self, context: Context, enforcement: Enforcement) -> None:
        self.context = context
        self.enforcement = enforcement

    async def find(self, name: str) -> Found[OperatorPolicy]:
        """The policy and its revision, or NotFound."""
        if found := await OPERATOR_POLICIES.get(self.context.store, check_label("policy", name)):
            return found
        raise NotFound(f"the operator has no policy {name}", "`insula policy ls --operator` lists them")

    async def get(self, name: str) -> OperatorPolicy:
        return (await self.find(name)).value

    async def list(self) -> list[OperatorPolicy]:
        """The policies in the order in which they are asked."""
        found = await OPERATOR_POLICIES.readable(self.context.store)
        return sorted(found, key=lambda policy: (policy.priority, policy.name))

    async def create(self, spec: OperatorPolicySpec) -> OperatorPolicy:
        """Create a policy. When this returns, it is in force on this host. Invalid, Conflict; Failed if it is not for
        some tenants, which is tried again."""
        policy = OperatorPolicy(**checked(spec), name=check_label("policy", spec.name), created=time.time())
        if len(await self.list()) >= MAX_POLICIES:
            raise Conflict(f"there are {MAX_POLICIES} policies of the operator", "remove one first")
        put = OPERATOR_POLICIES.put(policy, policy.name)
        try:
            await self.context.store.transact([OPERATOR_POLICIES.absent(policy.name)], [put])
        except TransactionConflict:
            raise Conflict(f"the operator has a policy {policy.name} already", "choose another name") from None
        await self._enforce(policy)
        return policy

    async def update(self, name: str, patch: OperatorPolicyPatch) -> OperatorPolicy:
        """Change a policy, all or nothing. When this returns, it is in force on this host. Invalid, NotFound, Conflict;
        Failed as with `create`."""
        if patch == OperatorPolicyPatch():
            raise Invalid("there is nothing to change", "give rules, tenants or a priority")
        found = await self.find(name)
        policy = msgspec.structs.replace(found.value, **checked(patch))
        try:
            unchanged = [OPERATOR_POLICIES.unchanged(found, name)]
            await self.context.store.transact(unchanged, [OPERATOR_POLICIES.put(policy, name)])
        except TransactionConflict:
            raise Conflict(f"policy {name} was changed at the same time", "try again") from None
        await self._enforce(found.value, policy)
        return policy

    async def remove(self, name: str) -> None:
        """Remove a policy. When this returns, it is no longer in force on this host."""
        found = await self.find(name)
        try:
            changed = [OPERATOR_POLICIES.unchanged(found, name)]
            await self.context.store.transact(changed, [OPERATOR_POLICIES.delete(name)])
        except TransactionConflict:
            raise Conflict(f"policy {name} was changed at the same time", "try again") from None
        await self._enforce(found.value)

    async def _enforce(self, *policies: OperatorPolicy) -> None:
        """Bring a change into force for the tenants that it concerns, by the policy before or after it; one that fails
        is tried again."""
        tenants = await TENANTS.readable(self.context.store)
        concerned = [t for t in tenants if any(matches(policy.tenants, t.labels) for policy in policies)]
        done = await asyncio.gather(
            *(self.enforcement.enforced(tenant.name) for tenant in concerned), return_exceptions=True
        )
        failed = []
        for tenant, result in zip(concerned, done, strict=True):
            if isinstance(result, NotFound):
                continue  # it was removed
            if isinstance(result, InsulaError | OSError):
                self.enforcement.controller.nudge(tenant.name)
                failed.append(tenant.name)
            elif isinstance(result, BaseException):
                raise result
        if failed:
            what = f"policy {policies[0].name} is not in force yet for {', '.join(failed[:3])}"
            raise Failed(what, "it is tried again; see `insula status`")


def checked(given: OperatorPolicySpec | OperatorPolicyPatch) -> dict[str, Any]:
    """Return the fields that are given, in canonical form, without the name. Invalid."""
    found: dict[str, Any] = {}
    if not isinstance(given.priority, UnsetType):
        if not 0 <= given.priority <= MAX_PRIORITY:
            raise Invalid(f"{given.priority} is no priority", f"use 0 to {MAX_PRIORITY}; the lowest is asked first")
        found["priority"] = given.priority
    if not isinstance(given.tenants, UnsetType):
        found["tenants"] = check_selector(given.tenants)
    if not isinstance(given.rules, UnsetType):
        found["rules"] = check_operator_rules(given.rules)
    if not isinstance(given.labels, UnsetType):
        found["labels"] = check_labels(given.labels)
    return found
