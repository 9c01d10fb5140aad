"""Answers for tenants: results are converted to the types that their owner may see (model/own_views.py).

A type that is neither in the table nor free of the host's numbers is refused, so that a new route can't reveal anything
by accident. Values of environment variables, which often are secrets, are shown only to principals that could read
them in the instance.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from insula.api.redaction import shown
from insula.control.identities.authority import Authority
from insula.model.accounting import TenantUsage
from insula.model.declared import DeclaredItem
from insula.model.floating_ips import FloatingIpView
from insula.model.guarantees import GuaranteeView
from insula.model.guests import GuestReport
from insula.model.load_balancers import LoadBalancerView
from insula.model.migration import MigrationOutcome, MigrationTicket
from insula.model.objects import Exit, Image, Instance, InstanceStatus
from insula.model.own_views import HIDDEN, OwnExplanation, OwnInstanceView, OwnNetworkView, OwnProcess, OwnTenantView
from insula.model.peerings import PeeringView
from insula.model.policies import AddressGroup
from insula.model.policy_views import EffectivePolicies, PolicyView
from insula.model.principals import (
    Authorities,
    BindingView,
    CertificateCreated,
    CertificateView,
    Invitation,
    LoginInfo,
    PrincipalView,
    TokenCreated,
    TokenView,
    WhoAmI,
)
from insula.model.routers import RouterView
from insula.model.service_endpoints import ServiceEndpoint
from insula.model.snapshots import SnapshotView
from insula.model.tracing import TraceView
from insula.model.views import (
    Explanation,
    InstanceStats,
    InstanceView,
    NetworkView,
    ProcessView,
    Started,
    StatsSample,
    TenantView,
)

NARROW: dict[type[msgspec.Struct], type[msgspec.Struct]] = {
    TenantView: OwnTenantView,
    NetworkView: OwnNetworkView,
    InstanceView: OwnInstanceView,
    Explanation: OwnExplanation,
    ProcessView: OwnProcess,
}
FREE = (
    Image,
    Exit,
    Started,
    SnapshotView,
    MigrationTicket,
    MigrationOutcome,
    StatsSample,
    InstanceStats,
    GuestReport,
    TenantUsage,
    WhoAmI,
    PrincipalView,
    BindingView,
    TokenView,
    TokenCreated,
    CertificateView,
    CertificateCreated,
    Invitation,
    DeclaredItem,
    RouterView,
    PolicyView,
    EffectivePolicies,
    AddressGroup,
    PeeringView,
    ServiceEndpoint,
    FloatingIpView,
    LoadBalancerView,
    GuaranteeView,
    TraceView,
    Authorities,
    LoginInfo,
)
_OF_HOST = ("revision", "pid")  # keys of events


def for_sender(value: Any, authority: Authority) -> Any:
    """Return the parts of an answer that the sender of a request may see. TypeError for a type without a rule."""
    if isinstance(value, list | tuple):
        return [for_sender(each, authority) for each in value]
    if isinstance(value, dict):
        if authority.sees_host:
            return value
        return {k: shown(v) if k == "error" and v else v for k, v in value.items() if k not in _OF_HOST}
    if not isinstance(value, msgspec.Struct):
        return value
    if isinstance(value, InstanceView | Explanation):
        value = replace(value, instance=_without_secrets(value.instance, authority))
    return value if authority.sees_host else _narrow(value)


def _narrow(value: msgspec.Struct) -> msgspec.Struct:
    if isinstance(value, ProcessView):
        value = replace(value, pids=value.pids[1:])
    if isinstance(value, Explanation):
        value = replace(value, processes=[replace(each, pids=each.pids[1:]) for each in value.processes])
    if isinstance(value, InstanceView | Explanation):
        value = replace(value, status=_told(value.status))
    if isinstance(value, TraceView):
        value = replace(value, rules=[])  # their text has devices and addresses of the host
    if isinstance(value, DeclaredItem) and value.reason:
        value = replace(value, reason=shown(value.reason))
    if kind := NARROW.get(type(value)):
        narrow: msgspec.Struct = msgspec.convert(value, kind, from_attributes=True)
        return narrow
    if isinstance(value, FREE):
        return value
    raise TypeError(f"nobody has decided what tenants see of {type(value).__name__}")


def _told(status: InstanceStatus) -> InstanceStatus:
    if status.error is None:
        return status
    return replace(status, error=shown(status.error), hint=status.hint and shown(status.hint))


def _without_secrets(instance: Instance, authority: Authority) -> Instance:
    """Hide the values of environment variables from principals that can't run a process in the instance."""
    if authority.sees_environment(instance.tenant):
        return instance
    spec = replace(instance.spec, env=dict.fromkeys(instance.spec.env, HIDDEN))
    names = [entry.partition("=")[0] for entry in instance.config.env]
    return replace(instance, spec=spec, config=replace(instance.config, env=[f"{name}={HIDDEN}" for name in names]))
