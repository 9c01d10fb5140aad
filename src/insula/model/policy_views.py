"""Requests and answers about policies and address groups."""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from insula.model import fields, rules
from insula.model.objects import Struct
from insula.model.policies import Direction, OperatorRule, Policy, PolicyRule, Selector

Directions = Annotated[list[Direction], fields.at_most(2, least=1)]
PolicyRules = Annotated[list[PolicyRule], fields.at_most(rules.MAX_POLICY_RULES)]
OperatorRules = Annotated[list[OperatorRule], fields.at_most(rules.MAX_POLICY_RULES, least=1)]
GroupCidrs = Annotated[list[fields.Cidr], fields.at_most(rules.MAX_GROUP_CIDRS)]


class PolicySpec(Struct, kw_only=True):
    """The request of `insula policy create`. `select` is required: an empty one selects every instance."""

    name: fields.Label
    select: Selector
    directions: Directions
    rules: PolicyRules = []
    audit: bool = False
    dns: bool = True
    labels: fields.Labels = {}


class PolicyPatch(Struct, kw_only=True):
    """Changes of a policy, all or none. Fields that are absent stay. `rules` replaces all; `add_rules` and
    `remove_rules` change some, and a rule that is to be removed must be there."""

    select: Selector | UnsetType = UNSET
    directions: Directions | UnsetType = UNSET
    rules: PolicyRules | UnsetType = UNSET
    add_rules: PolicyRules = []
    remove_rules: PolicyRules = []
    audit: bool | UnsetType = UNSET
    dns: bool | UnsetType = UNSET


class AuditedFlow(Struct, kw_only=True):
    """Connections that a policy in audit would have denied, between two addresses, of which the tenant's own have the
    name of their instance. `port` is that of TCP and UDP, or the ICMP type. A connection is counted when it begins, and
    once more when policies change while it is open."""

    direction: Direction
    source: str
    source_instance: str | None
    destination: str
    destination_instance: str | None
    protocol: str
    port: int
    connections: int


class PolicyView(Struct, kw_only=True):
    """A policy, the instances on this host that it selects, and what it would have denied if it is in audit."""

    policy: Policy
    selects: list[str]
    audited: list[AuditedFlow] = []


class EffectiveRule(Struct, kw_only=True):
    """A rule that applies to an instance, and the policy that it belongs to."""

    policy: str
    rule: PolicyRule


class EffectiveDirection(Struct, kw_only=True):
    """What applies to an instance in one direction. Without `isolated_by` everything is allowed; else only what one of
    `rules` allows. `reason` says it for people."""

    direction: Direction
    isolated_by: list[str]
    rules: list[EffectiveRule]
    audited_by: list[str] = []
    reason: str


class EffectiveOperatorRule(Struct, kw_only=True):
    """A rule of the operator that applies, and the policy that it belongs to. The first that matches decides."""

    policy: str
    rule: OperatorRule


class LeasedAddress(Struct, kw_only=True):
    """An address that an instance may reach because it has asked for names of rules, and for how many seconds more. It
    is renewed while there is a connection."""

    address: str
    names: list[str]
    seconds: float


class EffectivePolicies(Struct, kw_only=True):
    """All that applies to an instance. `dns`: whether it may ask the resolver at its gateway, and `dns_reason` why.
    `leases` are the addresses that it may reach by DNS names now."""

    tenant: str
    instance: str
    operator: list[EffectiveOperatorRule]
    directions: list[EffectiveDirection]
    dns: bool
    dns_reason: str
    leases: list[LeasedAddress] = []


class AddressGroupSpec(Struct, kw_only=True):
    """The request of `insula group create`."""

    name: fields.Label
    cidrs: GroupCidrs
    labels: fields.Labels = {}


class AddressGroupPatch(Struct, kw_only=True):
    """Changes of an address group, all or none: `cidrs` replaces all, `add` and `remove` change some."""

    cidrs: GroupCidrs | UnsetType = UNSET
    add: GroupCidrs = []
    remove: GroupCidrs = []


class OperatorPolicySpec(Struct, kw_only=True):
    """The request of `insula policy create --operator`. An empty selector `tenants` selects every tenant."""

    name: fields.Label
    priority: fields.Priority = 1000
    tenants: Selector = msgspec.field(default_factory=Selector)
    rules: OperatorRules
    labels: fields.Labels = {}


class OperatorPolicyPatch(Struct, kw_only=True):
    """Changes of a policy of the operator, all or none. Fields that are absent stay; `rules` replaces all."""

    priority: fields.Priority | UnsetType = UNSET
    tenants: Selector | UnsetType = UNSET
    rules: OperatorRules | UnsetType = UNSET
    labels: fields.Labels | UnsetType = UNSET
