"""Policies of tenants' networks, and those of the operator.

A `Policy` selects instances by their labels. Once a policy selects an instance in a direction, only packets that the
rules of some policy allow pass in that direction; the order of policies and rules never matters. The semantics are in
docs/networking.md. An `OperatorPolicy` is above the tenants' policies: its rules have an order, and the first that
matches decides.
"""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from insula.model import fields, rules
from insula.model.objects import Struct

Direction = Literal["in", "out"]


class LabelRequirement(Struct, kw_only=True):
    """A condition on one label, as in Kubernetes (LabelSelectorRequirement). `NotIn` holds for an absent label too."""

    key: fields.LabelName
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: Annotated[list[fields.LabelValue], fields.at_most(rules.MAX_LABEL_VALUES)] = []


class Selector(Struct, kw_only=True):
    """Conditions on labels, all of which must hold. A selector without conditions selects everything."""

    labels: fields.Labels = {}
    expressions: Annotated[list[LabelRequirement], fields.at_most(rules.MAX_EXPRESSIONS)] = []


# -- peers -----------------------------------------------------------------------------------------------------------


class AnyPeer(Struct, kw_only=True, tag_field="type", tag="any"):
    """Every address, inside and outside."""


class InstancePeer(Struct, kw_only=True, tag_field="type", tag="instances"):
    """The tenant's instances with these labels on this network. None is all of the tenant's networks."""

    select: Selector = msgspec.field(default_factory=Selector)
    network: fields.Label | None = None


class CidrPeer(Struct, kw_only=True, tag_field="type", tag="cidr"):
    """The addresses of a range, without those of the exceptions, whoever has them: an instance inside the range too."""

    cidr: fields.Cidr
    exceptions: Annotated[list[fields.Cidr], fields.at_most(rules.MAX_EXCEPTIONS)] = []


class GroupPeer(Struct, kw_only=True, tag_field="type", tag="group"):
    """The addresses of an address group."""

    group: fields.Label


class NamePeer(Struct, kw_only=True, tag_field="type", tag="name"):
    """The hosts of a DNS name; ``*.example.com`` is any name below example.com, and not example.com itself."""

    name: fields.NamePattern


PolicyPeer = AnyPeer | InstancePeer | CidrPeer | GroupPeer | NamePeer
"""Whom a rule concerns: a tagged union by `type`. Conditions within a peer must all hold; of several peers one does."""


class PortMatch(Struct, kw_only=True):
    """A protocol with some of its ports, or of its ICMP types.

    `port` to `end_port` are ports of TCP and UDP; without them all. `icmp` is ICMP over IPv4 and `icmpv6` ICMP over
    IPv6; without a type, `icmp` is every type of both. Only requests are matched, since answers belong to them.
    """

    protocol: Literal["tcp", "udp", "icmp", "icmpv6"]
    port: fields.PortNumber | None = None
    end_port: fields.PortNumber | None = None
    icmp_type: fields.IcmpType | None = None


PortMatches = Annotated[list[PortMatch], fields.at_most(rules.MAX_PORT_MATCHES)]


# -- policies of tenants ---------------------------------------------------------------------------------------------


class PolicyRule(Struct, kw_only=True):
    """A rule allows packets from (`in`) or to (`out`) any of `peers`, of any of `ports`; without ports of any protocol,
    also of those that have no ports."""

    direction: Direction
    peers: Annotated[list[PolicyPeer], fields.at_most(rules.MAX_PEERS, least=1)]
    ports: PortMatches = []


class Policy(Struct, kw_only=True):
    """A policy of a tenant.

    It selects instances in `directions`. With `audit` it neither denies nor allows anything: what it would have denied
    is counted. Without `dns`, the resolver at the gateway is closed to the instances that it selects in direction out.
    """

    tenant: str
    name: str
    select: Selector
    directions: list[Direction]
    rules: list[PolicyRule] = []
    audit: bool = False
    dns: bool = True
    labels: dict[str, str] = {}
    created: float


class AddressGroup(Struct, kw_only=True):
    """Ranges of addresses under one name, for the rules of policies."""

    tenant: str
    name: str
    cidrs: list[str]
    labels: dict[str, str] = {}
    created: float


# -- policies of the operator ----------------------------------------------------------------------------------------


class OperatorRule(Struct, kw_only=True):
    """A rule about packets between instances of tenants and the outside: of direction `out` to `peers`, or `in` from
    them. `accept` lets them pass whatever the tenant's policies say, `deny` drops them, `pass` leaves the decision to
    the tenant's policies."""

    action: Literal["accept", "deny", "pass"]
    direction: Direction
    peers: Annotated[list[AnyPeer | CidrPeer], fields.at_most(rules.MAX_PEERS, least=1)]
    ports: PortMatches = []


class OperatorPolicy(Struct, kw_only=True):
    """A policy of the operator for all tenants with the labels of `tenants`. Policies are asked in the order of their
    `priority`, the lowest first, then of their names; rules in their own order. The first that matches decides."""

    name: str
    priority: int = 1000
    tenants: Selector = msgspec.field(default_factory=Selector)
    rules: list[OperatorRule]
    labels: dict[str, str] = {}
    created: float
