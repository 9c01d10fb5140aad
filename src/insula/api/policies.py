"""/v1/tenants/{tenant}/policies and /address-groups: who of a tenant may exchange what with whom; and
/v1/operator-policies: what holds above these."""

from __future__ import annotations

from litestar import Controller, delete, get, patch, post
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.pages import Paged
from insula.api.parameters import Name, Plane, TenantName
from insula.model.policies import AddressGroup, OperatorPolicy
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


class PolicyRoutes(Controller):
    path = "/tenants/{tenant:str}/policies"
    tags = ("policies",)

    @get(summary="List a tenant's policies, and whom each selects", permission="policy.read")
    async def list_policies(self, plane: Plane, tenant: TenantName, labelled: Paged) -> list[PolicyView]:
        views = await plane.policies.list(tenant)
        return labelled.of(views, lambda view: view.policy.name, labels=lambda view: view.policy.labels)

    @post(summary="Create a policy, in force for open connections too", permission="policy.write")
    async def create_policy(self, plane: Plane, tenant: TenantName, data: JSONBody[PolicySpec]) -> PolicyView:
        note(name=data.name)
        return await plane.policies.create(tenant, data)

    @get("/{policy:str}", summary="Show a policy, and what it would have denied", permission="policy.read")
    async def get_policy(self, plane: Plane, tenant: TenantName, policy: Name) -> PolicyView:
        return await plane.policies.get(tenant, policy)

    @patch("/{policy:str}", summary="Change a policy: all or nothing", permission="policy.write")
    async def update_policy(
        self, plane: Plane, tenant: TenantName, policy: Name, data: JSONBody[PolicyPatch]
    ) -> PolicyView:
        return await plane.policies.update(tenant, policy, data)

    @delete("/{policy:str}", summary="Remove a policy", permission="policy.write")
    async def remove_policy(self, plane: Plane, tenant: TenantName, policy: Name) -> None:
        await plane.policies.remove(tenant, policy)


class EffectivePolicyRoutes(Controller):
    path = "/tenants/{tenant:str}/effective-policies"
    tags = ("policies",)

    @get("/{name:str}", summary="Show all that applies to an instance, and why", permission="policy.read")
    async def get_effective_policies(self, plane: Plane, tenant: TenantName, name: Name) -> EffectivePolicies:
        return await plane.policies.effective(tenant, name)


class AddressGroupRoutes(Controller):
    path = "/tenants/{tenant:str}/address-groups"
    tags = ("policies",)

    @get(summary="List a tenant's address groups", permission="policy.read")
    async def list_address_groups(self, plane: Plane, tenant: TenantName, labelled: Paged) -> list[AddressGroup]:
        groups = await plane.address_groups.list(tenant)
        return labelled.of(groups, lambda group: group.name, labels=lambda group: group.labels)

    @post(summary="Create an address group", permission="policy.write")
    async def create_address_group(
        self, plane: Plane, tenant: TenantName, data: JSONBody[AddressGroupSpec]
    ) -> AddressGroup:
        note(name=data.name)
        return await plane.address_groups.create(tenant, data.name, data.cidrs, data.labels)

    @get("/{group:str}", summary="Show an address group", permission="policy.read")
    async def get_address_group(self, plane: Plane, tenant: TenantName, group: Name) -> AddressGroup:
        return await plane.address_groups.get(tenant, group)

    @patch("/{group:str}", summary="Change the ranges of an address group", permission="policy.write")
    async def update_address_group(
        self, plane: Plane, tenant: TenantName, group: Name, data: JSONBody[AddressGroupPatch]
    ) -> AddressGroup:
        return await plane.address_groups.update(tenant, group, data)

    @delete("/{group:str}", summary="Remove an address group that no policy uses", permission="policy.write")
    async def remove_address_group(self, plane: Plane, tenant: TenantName, group: Name) -> None:
        await plane.address_groups.remove(tenant, group)


class OperatorPolicyRoutes(Controller):
    path = "/operator-policies"
    tags = ("policies",)

    @get(summary="List the operator's policies, in order", permission="operator-policy.read")
    async def list_operator_policies(self, plane: Plane, labelled: Paged) -> list[OperatorPolicy]:
        policies = await plane.operator_policies.list()
        return labelled.of(policies, lambda policy: policy.name, labels=lambda policy: policy.labels)

    @post(summary="Create a policy above those of the tenants", permission="operator-policy.write")
    async def create_operator_policy(self, plane: Plane, data: JSONBody[OperatorPolicySpec]) -> OperatorPolicy:
        note(name=data.name)
        return await plane.operator_policies.create(data)

    @get("/{policy:str}", summary="Show a policy of the operator", permission="operator-policy.read")
    async def get_operator_policy(self, plane: Plane, policy: Name) -> OperatorPolicy:
        return await plane.operator_policies.get(policy)

    @patch("/{policy:str}", summary="Change a policy of the operator", permission="operator-policy.write")
    async def update_operator_policy(
        self, plane: Plane, policy: Name, data: JSONBody[OperatorPolicyPatch]
    ) -> OperatorPolicy:
        return await plane.operator_policies.update(policy, data)

    @delete("/{policy:str}", summary="Remove a policy of the operator", permission="operator-policy.write")
    async def remove_operator_policy(self, plane: Plane, policy: Name) -> None:
        await plane.operator_policies.remove(policy)
