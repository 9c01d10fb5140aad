"""`PolicyOperations`, `AddressGroupOperations` and `OperatorPolicyOperations`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import UNSET

from insula.model.policies import AddressGroup, Direction, OperatorPolicy, OperatorRule, PolicyRule, Selector
from insula.model.policy_views import (
    AddressGroupPatch,
    AddressGroupSpec,
    EffectivePolicies,
    OperatorPolicyPatch,
    OperatorPolicySpec,
    PolicyPatch,
    PolicySpec,
    PolicyView,
)
from insula.sdk import answers
from insula.sdk._sync.calls import Caller


class PolicyOperations:
    """A tenant's policies, which say what instances may receive and send."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def list(
        self, tenant: str, *, prefix: str | None = None, labels: Sequence[str] = (), page: int | None = None
    ) -> Iterator[PolicyView]:
        """Yield the policies of a tenant: those whose names begin with `prefix`, and that have all `labels`."""
        query = {"prefix": prefix, "label": [*labels]}
        return self._caller.pages(answers.POLICIES, "tenants", tenant, "policies", query=query, page=page)

    def create(
        self,
        tenant: str,
        name: str,
        select: Selector,
        directions: Sequence[Direction],
        rules: Sequence[PolicyRule] = (),
        *,
        audit: bool = False,
        dns: bool = True,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> PolicyView:
        """Create a policy; it is in force, for open connections too, when this returns."""
        spec = PolicySpec(
            name=name,
            select=select,
            directions=[*directions],
            rules=[*rules],
            audit=audit,
            dns=dns,
            labels=dict(labels or {}),
        )
        return self._caller.change(
            answers.POLICY, "POST", "tenants", tenant, "policies", body=spec, key=idempotency_key
        )

    def get(self, tenant: str, policy: str) -> PolicyView:
        """Return a policy, and what it would have denied if it is in audit."""
        return self._caller.get(answers.POLICY, "tenants", tenant, "policies", policy)

    def effective(self, tenant: str, instance: str) -> EffectivePolicies:
        """Return all that applies to an instance, and why."""
        return self._caller.get(answers.EFFECTIVE, "tenants", tenant, "effective-policies", instance)

    def update(
        self,
        tenant: str,
        policy: str,
        *,
        select: Selector | None = None,
        directions: Sequence[Direction] | None = None,
        rules: Sequence[PolicyRule] | None = None,
        add_rules: Sequence[PolicyRule] = (),
        remove_rules: Sequence[PolicyRule] = (),
        audit: bool | None = None,
        dns: bool | None = None,
        idempotency_key: str | None = None,
    ) -> PolicyView:
        """Change a policy: all or nothing. None leaves a part as it is."""
        patch = PolicyPatch(
            select=UNSET if select is None else select,
            directions=UNSET if directions is None else [*directions],
            rules=UNSET if rules is None else [*rules],
            add_rules=[*add_rules],
            remove_rules=[*remove_rules],
            audit=UNSET if audit is None else audit,
            dns=UNSET if dns is None else dns,
        )
        return self._caller.change(
            answers.POLICY, "PATCH", "tenants", tenant, "policies", policy, body=patch, key=idempotency_key
        )

    def remove(self, tenant: str, policy: str, *, idempotency_key: str | None = None) -> None:
        self._caller.do("DELETE", "tenants", tenant, "policies", policy, key=idempotency_key)


class AddressGroupOperations:
    """A tenant's address groups: ranges under one name, for the rules of policies."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def list(
        self, tenant: str, *, prefix: str | None = None, labels: Sequence[str] = (), page: int | None = None
    ) -> Iterator[AddressGroup]:
        """Yield the groups of a tenant: those whose names begin with `prefix`, and that have all `labels`."""
        query = {"prefix": prefix, "label": [*labels]}
        return self._caller.pages(answers.ADDRESS_GROUPS, "tenants", tenant, "address-groups", query=query, page=page)

    def create(
        self,
        tenant: str,
        name: str,
        cidrs: Sequence[str],
        *,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> AddressGroup:
        spec = AddressGroupSpec(name=name, cidrs=[*cidrs], labels=dict(labels or {}))
        return self._caller.change(
            answers.ADDRESS_GROUP, "POST", "tenants", tenant, "address-groups", body=spec, key=idempotency_key
        )

    def get(self, tenant: str, group: str) -> AddressGroup:
        return self._caller.get(answers.ADDRESS_GROUP, "tenants", tenant, "address-groups", group)

    def update(
        self,
        tenant: str,
        group: str,
        *,
        cidrs: Sequence[str] | None = None,
        add: Sequence[str] = (),
        remove: Sequence[str] = (),
        idempotency_key: str | None = None,
    ) -> AddressGroup:
        """Change the ranges, all or nothing: `cidrs` replaces all, `add` and `remove` change some."""
        patch = AddressGroupPatch(cidrs=UNSET if cidrs is None else [*cidrs], add=[*add], remove=[*remove])
        where = ("tenants", tenant, "address-groups", group)
        return self._caller.change(answers.ADDRESS_GROUP, "PATCH", *where, body=patch, key=idempotency_key)

    def remove(self, tenant: str, group: str, *, idempotency_key: str | None = None) -> None:
        """Remove a group. Conflict while a policy uses it."""
        self._caller.do("DELETE", "tenants", tenant, "address-groups", group, key=idempotency_key)


class OperatorPolicyOperations:
    """Policies of the operator, above those of the tenants."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def list(
        self, *, prefix: str | None = None, labels: Sequence[str] = (), page: int | None = None
    ) -> Iterator[OperatorPolicy]:
        """Yield the policies in the order in which they are asked."""
        query = {"prefix": prefix, "label": [*labels]}
        return self._caller.pages(answers.OPERATOR_POLICIES, "operator-policies", query=query, page=page)

    def create(
        self,
        name: str,
        rules: Sequence[OperatorRule],
        *,
        tenants: Selector | None = None,
        priority: int = 1000,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> OperatorPolicy:
        """Create a policy for the tenants that a selector selects, by default all."""
        spec = OperatorPolicySpec(
            name=name,
            rules=[*rules],
            tenants=tenants or Selector(),
            priority=priority,
            labels=dict(labels or {}),
        )
        return self._caller.change(answers.OPERATOR_POLICY, "POST", "operator-policies", body=spec, key=idempotency_key)

    def get(self, policy: str) -> OperatorPolicy:
        return self._caller.get(answers.OPERATOR_POLICY, "operator-policies", policy)

    def update(
        self,
        policy: str,
        *,
        rules: Sequence[OperatorRule] | None = None,
        tenants: Selector | None = None,
        priority: int | None = None,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> OperatorPolicy:
        """Change a policy: all or nothing. None leaves a part as it is."""
        patch = OperatorPolicyPatch(
            rules=UNSET if rules is None else [*rules],
            tenants=UNSET if tenants is None else tenants,
            priority=UNSET if priority is None else priority,
            labels=UNSET if labels is None else dict(labels),
        )
        return self._caller.change(
            answers.OPERATOR_POLICY, "PATCH", "operator-policies", policy, body=patch, key=idempotency_key
        )

    def remove(self, policy: str, *, idempotency_key: str | None = None) -> None:
        self._caller.do("DELETE", "operator-policies", policy, key=idempotency_key)
