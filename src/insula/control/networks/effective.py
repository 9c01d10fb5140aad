"""What policies mean for one instance, and what a policy in audit would have denied: reports for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from insula.model.policies import Direction, Policy
from insula.model.policy_views import (
    AuditedFlow,
    EffectiveDirection,
    EffectiveOperatorRule,
    EffectivePolicies,
    EffectiveRule,
    LeasedAddress,
)
from insula.network.fabric import CountedFlow, NameLease
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.names.compiler import has_names
from insula.network.reference.policy_model import matches, port_of, would_deny


def selected(policy: Policy, labels: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the instances that a policy selects; `labels` are those of all of the tenant's."""
    return sorted(name for name, own in labels.items() if matches(policy.select, own))


def effective(tenant: str, instance: str, intent: PolicyIntent, leases: Iterable[NameLease] = ()) -> EffectivePolicies:
    """Return all that applies to an instance; `leases` are those of the tenant."""
    labels = intent.labels.get(instance, {})
    selecting = [policy for policy in intent.policies if matches(policy.select, labels)]
    deaf = [p.name for p in selecting if not p.dns and not p.audit and "out" in p.directions]
    named = has_names(policy for policy in selecting if not policy.audit)
    open_ = (
        "names of rules and the tenant's own only" if named else "the resolver at the gateway is open unless --no-dns"
    )
    reason = f"closed by policy {', '.join(deaf)}" if deaf else open_
    return EffectivePolicies(
        tenant=tenant,
        instance=instance,
        operator=[EffectiveOperatorRule(policy=p.name, rule=rule) for p in intent.operator for rule in p.rules],
        directions=[_direction(direction, selecting) for direction in ("in", "out")],
        dns=not deaf,
        dns_reason=reason,
        leases=[
            LeasedAddress(address=each.address, names=list(each.names), seconds=each.seconds)
            for each in leases
            if each.instance == instance
        ],
    )


def _direction(direction: Direction, selecting: Iterable[Policy]) -> EffectiveDirection:
    here = [policy for policy in selecting if direction in policy.directions]
    enforced = [policy for policy in here if not policy.audit]
    rules = [
        EffectiveRule(policy=policy.name, rule=rule)
        for policy in enforced
        for rule in policy.rules
        if rule.direction == direction
    ]
    names = [policy.name for policy in enforced]
    if not enforced:
        reason = f"no policy selects it in direction {direction}: everything is allowed"
    elif not rules:
        reason = f"selected by {', '.join(names)}, which allow nothing: everything is denied"
    else:
        reason = f"selected by {', '.join(names)}: only what one of the rules allows"
    audits = [policy.name for policy in here if policy.audit]
    return EffectiveDirection(direction=direction, isolated_by=names, rules=rules, audited_by=audits, reason=reason)


def audited_flows(intent: TenantIntent, policy: Policy, counted: Iterable[CountedFlow]) -> list[AuditedFlow]:
    """Return the flows that a policy in audit would have denied, the most frequent first."""
    found = []
    for flow in counted:
        ends = flow.source, flow.destination
        if would_deny(intent, policy, flow.direction, *ends, flow.protocol, flow.port):
            source, destination = (port_of(intent, each) for each in ends)
            found.append(
                AuditedFlow(
                    direction=flow.direction,
                    source=flow.source,
                    source_instance=source.instance if source else None,
                    destination=flow.destination,
                    destination_instance=destination.instance if destination else None,
                    protocol=flow.protocol,
                    port=flow.port,
                    connections=flow.connections,
                )
            )
    return sorted(
        found, key=lambda flow: (-flow.connections, flow.source, flow.destination, flow.protocol, flow.port or 0)
    )
