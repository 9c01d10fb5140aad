"""What makes objects of the answers of each route."""

from __future__ import annotations

from insula.model.accounting import TenantUsage
from insula.model.declared import DeclaredItem
from insula.model.floating_ips import FloatingIpView
from insula.model.guarantees import GuaranteeView
from insula.model.guests import GuestReport
from insula.model.load_balancers import LoadBalancerView
from insula.model.migration import MigrationTicket
from insula.model.objects import Exit, Image
from insula.model.own_views import OwnExplanation, OwnInstanceView, OwnNetworkView, OwnProcess, OwnTenantView
from insula.model.peerings import PeeringView
from insula.model.policies import AddressGroup, OperatorPolicy
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
    AuditHead,
    AuditKey,
    Check,
    Explanation,
    HostStatus,
    InstanceView,
    NetworkView,
    ProcessView,
    Started,
    StatsSample,
    TenantView,
    VerifyReport,
    WhoIs,
)
from insula.sdk.decoding import either, many, of
from insula.sdk.types import ImageProgress

TENANT = either(TenantView, OwnTenantView)
TENANTS = many(TENANT)
TENANT_USAGE = of(TenantUsage)
TENANT_USAGES = many(TENANT_USAGE)
NETWORK = either(NetworkView, OwnNetworkView)
NETWORKS = many(NETWORK)
ROUTER = of(RouterView)
POLICY = of(PolicyView)
POLICIES = many(POLICY)
EFFECTIVE = of(EffectivePolicies)
ADDRESS_GROUP = of(AddressGroup)
ADDRESS_GROUPS = many(ADDRESS_GROUP)
OPERATOR_POLICY = of(OperatorPolicy)
OPERATOR_POLICIES = many(OPERATOR_POLICY)
ROUTERS = many(ROUTER)
PEERING = of(PeeringView)
PEERINGS = many(PEERING)
ENDPOINT = of(ServiceEndpoint)
ENDPOINTS = many(ENDPOINT)
FLOATING_IP = of(FloatingIpView)
FLOATING_IPS = many(FLOATING_IP)
LOAD_BALANCER = of(LoadBalancerView)
LOAD_BALANCERS = many(LOAD_BALANCER)
GUARANTEE = of(GuaranteeView)
GUARANTEES = many(GUARANTEE)
IMAGE = of(Image)
IMAGES = many(IMAGE)
IMAGE_PROGRESS = of(ImageProgress)
INSTANCE = either(InstanceView, OwnInstanceView)
INSTANCES = many(INSTANCE)
PROCESSES = many(either(ProcessView, OwnProcess))
EXPLANATION = either(Explanation, OwnExplanation)
EXIT = of(Exit)
GUEST_REPORT = of(GuestReport)
MIGRATION_TICKET = of(MigrationTicket)
SNAPSHOT = of(SnapshotView)
SNAPSHOTS = many(SNAPSHOT)
STARTED = of(Started)
STATS_SAMPLE = of(StatsSample)
WHO_AM_I = of(WhoAmI)
PRINCIPAL = of(PrincipalView)
PRINCIPALS = many(PRINCIPAL)
BINDING = of(BindingView)
BINDINGS = many(BINDING)
TOKEN_CREATED = of(TokenCreated)
TOKENS = many(of(TokenView))
CERTIFICATE_CREATED = of(CertificateCreated)
CERTIFICATES = many(of(CertificateView))
AUTHORITIES = of(Authorities)
INVITATION = of(Invitation)
LOGIN = of(LoginInfo)
HOST_STATUS = of(HostStatus)
CHECKS = many(of(Check))
VERIFY_REPORT = of(VerifyReport)
TRACE = of(TraceView)
WHO_IS = of(WhoIs)
AUDIT_HEAD = of(AuditHead)
AUDIT_KEY = of(AuditKey)
DECLARED_ITEM = of(DeclaredItem)
DECLARED_ITEMS = many(DECLARED_ITEM)


def nothing(_: object) -> None:
    """The answer of a route that has none."""
