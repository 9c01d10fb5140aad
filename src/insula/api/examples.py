"""Examples for the description of the API: one object of each kind, made of the structs themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, get_origin

import msgspec

from insula.api.images import BaseSpec, PullSpec, PushSpec, SaveSpec, TagSpec
from insula.model.accounting import InstanceUsage, ReservedTotals, TenantUsage, TrafficTotals, UsedTotals
from insula.model.declared import ApplySpec, DeclaredFile, DeclaredItem
from insula.model.disks import FurtherDisk
from insula.model.floating_ips import FloatingIp, FloatingIpPatch, FloatingIpSpec, FloatingIpView
from insula.model.guarantees import GuaranteePatch, GuaranteeView
from insula.model.guests import GuestReport, ReportedInterface
from insula.model.load_balancers import (
    BackendCheck,
    BackendView,
    BalancerAddress,
    BalancerPort,
    LoadBalancerPatch,
    LoadBalancerSpec,
    LoadBalancerView,
)
from insula.model.migration import MigrationOutcome, MigrationQuery, MigrationTarget, MigrationTicket
from insula.model.objects import (
    Exit,
    Image,
    ImageConfig,
    Instance,
    InstanceSpec,
    InstanceStatus,
    Limits,
    Network,
    NetworkAttachment,
    NetworkStatus,
    OverlayRoot,
    Port,
    PublishedPort,
    Resources,
    Tenant,
)
from insula.model.peerings import PeeredNetwork, PeeringAcceptance, PeeringOffer, PeeringView
from insula.model.policies import (
    AddressGroup,
    CidrPeer,
    InstancePeer,
    OperatorPolicy,
    OperatorRule,
    Policy,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.model.policy_views import (
    AddressGroupPatch,
    AddressGroupSpec,
    AuditedFlow,
    EffectiveDirection,
    EffectiveOperatorRule,
    EffectivePolicies,
    EffectiveRule,
    LeasedAddress,
    OperatorPolicyPatch,
    OperatorPolicySpec,
    PolicyPatch,
    PolicySpec,
    PolicyView,
)
from insula.model.principals import (
    Authorities,
    BindingSpec,
    BindingView,
    CertificateCreated,
    CertificateSpec,
    CertificateView,
    Invitation,
    JoinSpec,
    LoginInfo,
    LoginProvider,
    Principal,
    PrincipalView,
    ServiceAccountSpec,
    TokenCreated,
    TokenSpec,
    TokenView,
    UserSpec,
    WhoAmI,
)
from insula.model.routers import Router, RouterPatch, RouterSpec, RouterStatus, RouterView, StaticRoute
from insula.model.service_endpoints import ServiceEndpoint, ServiceEndpointSpec
from insula.model.snapshots import ForkSpec, SnapshotSpec, SnapshotView
from insula.model.tracing import TraceView
from insula.model.views import (
    AuditHead,
    AuditKey,
    Check,
    ExecSpec,
    Explanation,
    HostStatus,
    InstancePatch,
    InstanceStats,
    InstanceView,
    Layer,
    LimitsPatch,
    Namespace,
    NetworkPatch,
    NetworkSpec,
    NetworkView,
    ProcessView,
    PublishedPatch,
    Started,
    StatsSample,
    TenantPatch,
    TenantSpec,
    TenantView,
    Usage,
    VerifyReport,
    WhoIs,
)

_NOW = 1_767_225_600.0
_DIGEST = "sha256:" + "5e" * 32
_SERIAL = "1f2e3d4c5b6a"
_MIB = 1 << 20
_TENANT = Tenant(name="acme", index=0, id_base=1 << 30, limits=Limits(cpus=2, memory=4096 * _MIB), created=_NOW)
_NETWORK = Network(
    tenant="acme",
    name="default",
    index=7,
    vni=4096,
    subnet="10.0.0.0/24",
    gateway="10.0.0.1",
    created=_NOW,
)
_ROUTE = StaticRoute(destination="172.16.0.0/12", next_hop="10.0.0.2")
_RULE = PolicyRule(
    direction="in",
    peers=[InstancePeer(select=Selector(labels={"app": "web"}))],
    ports=[PortMatch(protocol="tcp", port=5432)],
)
_POLICY = Policy(
    tenant="acme",
    name="db",
    select=Selector(labels={"app": "db"}),
    directions=["in"],
    rules=[_RULE],
    audit=True,
    created=_NOW,
)
_AUDITED = AuditedFlow(
    direction="in",
    source="10.0.0.9",
    source_instance="cron",
    destination="10.0.0.2",
    destination_instance="db",
    protocol="tcp",
    port=5432,
    connections=3,
)
_OPERATOR_RULE = OperatorRule(action="deny", direction="out", peers=[CidrPeer(cidr="10.0.0.0/8")])
_SPEC = InstanceSpec(
    name="web",
    image="busybox:latest",
    command=["httpd", "-f"],
    labels={"team": "blue"},
    resources=Resources(cpus=0.5, memory=64 * _MIB),
)
_CONFIG = ImageConfig(cmd=["sh"])
_PORT = Port(tenant="acme", network="default", instance="web", index=9, mac="02:00:00:00:00:02", address="10.0.0.2")
_INSTANCE = Instance(
    tenant="acme",
    name="web",
    id="0123456789abcdef" * 2,
    host="rack1",
    spec=_SPEC,
    image_digest=_DIGEST,
    config=_CONFIG,
    root=OverlayRoot(layers=[_DIGEST]),
    ports=[_PORT],
    wanted="running",
    starts=1,
    created=_NOW,
)
_STATUS = InstanceStatus(state="running", observed_generation=1, starts=1, pid=4711, start_time=815, started=_NOW)
_PROCESS = ProcessView(pid=4711, inside=1, pids=[4711, 1], parent=0, uid=1 << 30, user=0, state="S", command="httpd -f")
_USED = UsedTotals(
    cpu=1_250_000_000, received=5140, received_packets=10, sent=5140, sent_packets=10, memory=3600.0 * _MIB
)
_PRINCIPAL = Principal(id="0123456789abcdef", name="ann", uid=1000, created=_NOW)
_BINDING = BindingView(user="ann", kind="user", tenant="acme", role="member", created=_NOW)
_TOKEN = f"insula_{'0123456789abcdef'}_{'A' * 43}_{'0' * 8}"
_EXPIRES = _NOW + 30 * 86400
_DOCUMENT = "apiVersion: insula/v1\nkind: Network\nmetadata: {name: back}\nspec: {subnet: 10.1.0.0/24}\n"

_BACKEND = BackendView(instance="web", address="10.0.0.2", port=8080, state="healthy", reason="it passes its checks")
_OBJECTS: tuple[msgspec.Struct, ...] = (
    TenantSpec(name="acme", limits=LimitsPatch(cpus=2, memory=4096 * _MIB)),
    TenantPatch(cpus=4, labels={"trust": "low"}),
    TenantView(tenant=_TENANT, usage=Usage(instances=1, cpus=0.5, memory=64 * _MIB)),
    NetworkSpec(name="default", subnet="10.0.0.0/24"),
    NetworkPatch(outbound="none"),
    NetworkView(network=_NETWORK, status=NetworkStatus(ready=True, ports=1)),
    RouterSpec(name="core", networks=["default", "back"], routes=[_ROUTE]),
    PolicySpec(name="db", select=Selector(labels={"app": "db"}), directions=["in"], rules=[_RULE]),
    PolicyPatch(add_rules=[_RULE], audit=True),
    PolicyView(policy=_POLICY, selects=["db"], audited=[_AUDITED]),
    EffectivePolicies(
        tenant="acme",
        instance="db",
        operator=[EffectiveOperatorRule(policy="company", rule=_OPERATOR_RULE)],
        directions=[
            EffectiveDirection(
                direction="in",
                isolated_by=["db"],
                rules=[EffectiveRule(policy="db", rule=_RULE)],
                reason="selected by db: only what one of the rules allows",
            )
        ],
        dns=True,
        dns_reason="the resolver at the gateway is open unless --no-dns",
        leases=[LeasedAddress(address="203.0.113.7", names=["api.example.com"], seconds=311.5)],
    ),
    AddressGroupSpec(name="office", cidrs=["203.0.113.0/24"]),
    AddressGroupPatch(add=["198.51.100.0/24"]),
    AddressGroup(tenant="acme", name="office", cidrs=["203.0.113.0/24"], created=_NOW),
    OperatorPolicySpec(name="company", rules=[_OPERATOR_RULE]),
    OperatorPolicyPatch(priority=10),
    OperatorPolicy(name="company", rules=[_OPERATOR_RULE], created=_NOW),
    PeeringOffer(to="globex", networks=["back"], allow=[PortMatch(protocol="tcp", port=5432)]),
    ServiceEndpointSpec(name="db", network="default", peer="globex", instance="db", port=5432),
    ServiceEndpoint(
        tenant="acme",
        name="db",
        network="default",
        address="10.0.0.9",
        peer="globex",
        peering="peering",
        instance="db",
        protocol="tcp",
        port=5432,
        number=3,
        created=_NOW,
    ),
    FloatingIpSpec(name="web", instance="web"),
    FloatingIpPatch(instance="web"),
    FloatingIpView(
        floating_ip=FloatingIp(
            tenant="acme", name="web", address="203.0.113.70", instance="0123456789abcdef" * 2, created=_NOW
        ),
        instance="web",
        target="10.0.0.2",
    ),
    LoadBalancerSpec(
        name="shop",
        listen=[BalancerPort(port=80)],
        on=[BalancerAddress(network="default")],
        port=8080,
        select=Selector(labels={"app": "shop"}),
    ),
    LoadBalancerPatch(health=BackendCheck(kind="http", path="/health")),
    LoadBalancerView(
        tenant="acme",
        name="shop",
        listen=[BalancerPort(port=80)],
        on=[BalancerAddress(network="default")],
        port=8080,
        select=Selector(labels={"app": "shop"}),
        instances=[],
        affinity="none",
        health=BackendCheck(),
        labels={},
        created=_NOW,
        addresses=["10.0.0.9"],
        backends=[_BACKEND],
    ),
    PeeringAcceptance(networks=["default"]),
    PeeringView(
        tenant="acme",
        peer="globex",
        name="peering",
        state="active",
        offered_by="acme",
        networks=["back"],
        allow=[PortMatch(protocol="tcp", port=5432)],
        peer_networks=[PeeredNetwork(name="default", subnet="10.2.0.0/24")],
        peer_allow=[],
        created=_NOW,
    ),
    RouterPatch(join=["lab"], leave=["back"]),
    RouterView(
        router=Router(tenant="acme", name="core", networks=["default", "back"], routes=[_ROUTE], created=_NOW),
        status=RouterStatus(ready=True),
    ),
    GuaranteePatch(floor_out=50_000_000, ceiling_out=200_000_000, cpus=0.5),
    GuaranteeView(tenant="acme", instance="web", floor_out=50_000_000, cpus=0.5, created=_NOW),
    NetworkAttachment(network="back", address="10.1.0.9"),
    FurtherDisk(name="data", size=4 << 30, mount="/data"),
    Image(
        tenant="acme",
        name="busybox:latest",
        digest=_DIGEST,
        config_digest=_DIGEST,
        layers=[_DIGEST],
        size=4 * _MIB,
        config=_CONFIG,
        created=_NOW,
    ),
    PullSpec(reference="docker.io/library/nginx:1.27"),
    PushSpec(name="web:1", reference="registry.example.com/acme/web:1"),
    BaseSpec(release="bookworm"),
    TagSpec(source="busybox:latest", name="web:1"),
    SaveSpec(names=["web:1"]),
    _SPEC,
    InstanceView(instance=_INSTANCE, status=_STATUS),
    PublishedPatch(publish=[PublishedPort(port=8080, target=80)]),
    InstancePatch(memory=128 * _MIB, labels={"tier": "front", "old": None}),
    SnapshotSpec(name="before-upgrade", memory=True),
    SnapshotView(
        tenant="acme",
        instance="vm",
        name="before-upgrade",
        memory=True,
        state="ready",
        size=96 * _MIB,
        stopped=0.12,
        created=_NOW,
    ),
    ForkSpec(count=2),
    MigrationTicket(secret="Vb3…", authority="-----BEGIN CERTIFICATE-----…", expires=_NOW),
    MigrationTarget(addresses=["192.0.2.7:7443"], authority="-----BEGIN CERTIFICATE-----…", secret="Vb3…"),
    MigrationQuery(secret="Vb3…"),
    MigrationOutcome(arrived=True),
    ExecSpec(command=["ls", "/"]),
    Started(id="0123456789abcdef"),
    Exit(exit_status=0, finished=_NOW),
    _PROCESS,
    GuestReport(
        answered=True,
        hostname="web",
        system="Debian GNU/Linux 12 (bookworm)",
        kernel="6.1.0-32-amd64",
        interfaces=[ReportedInterface(name="enp1s1", mac="02:00:00:00:00:02", addresses=["10.0.0.2/24"])],
    ),
    Explanation(
        instance=_INSTANCE,
        status=_STATUS,
        processes=[_PROCESS],
        namespaces=[Namespace(kind="pid", inode=4026532201, shared=False)],
        uid_map="0 1073741824 65536",
        cgroups={"memory": "/insula/acme/web"},
        limits={"memory.max": str(64 * _MIB)},
        security={"seccomp": "2"},
        layers=[Layer(digest=_DIGEST, path="/var/lib/insula/images/layers/5e")],
        upper="/var/lib/insula/instances/0/upper",
        rules=None,
    ),
    TenantUsage(
        tenant="acme",
        since=_NOW,
        until=_NOW + 3600,
        used=_USED,
        other_cpu=7_000_000,
        images=TrafficTotals(received=2_252_704, received_packets=1602, sent=44_310, sent_packets=801),
        reserved=ReservedTotals(instances=3600.0, cpus=1800.0, memory=3600.0 * 64 * _MIB),
        instances=[InstanceUsage(name="web", used=_USED)],
    ),
    StatsSample(time=_NOW, instances=[InstanceStats(tenant="acme", name="web", state="running", cpu=0.1)]),
    UserSpec(name="ann", uid=1000),
    ServiceAccountSpec(name="ci"),
    PrincipalView(principal=_PRINCIPAL, bindings=[_BINDING]),
    BindingSpec(user="ann", role="member"),
    _BINDING,
    TokenSpec(ttl=7 * 86400, description="CI"),
    TokenView(id="0123456789abcdef", user="ann", description="CI", labels={}, created=_NOW, expires=_EXPIRES),
    TokenCreated(id="0123456789abcdef", token=_TOKEN, expires=_EXPIRES),
    CertificateSpec(ttl=7 * 86400),
    CertificateView(serial=_SERIAL, user="ann", created=_NOW, expires=_EXPIRES),
    CertificateCreated(serial=_SERIAL, pem="-----BEGIN CERTIFICATE-----\n…", expires=_EXPIRES),
    JoinSpec(user="ann"),
    Invitation(
        addresses=["cloud.example.com:7443"],
        authority="-----BEGIN CERTIFICATE-----\n…",
        token=_TOKEN,
        expires=_NOW + 900,
    ),
    Authorities(server="-----BEGIN CERTIFICATE-----\n…"),
    LoginInfo(
        authority="-----BEGIN CERTIFICATE-----\n…",
        providers=[
            LoginProvider(
                name="oidc",
                issuer="https://login.example.com/realms/lab",
                client_id="insula",
                audience="",
                scopes=["openid", "profile"],
            )
        ],
    ),
    WhoAmI(user="ann", id="0123456789abcdef", proof="uid 1000", tenants={"acme": "member"}),
    ApplySpec(files=[DeclaredFile(name="app.yaml", text=_DOCUMENT)], prune=True),
    DeclaredItem(kind="Network", name="back", tenant="acme", operation="create", state="done"),
    AuditHead(head=f"815:{'5e' * 32}", stored=f"807:{'2b' * 32}"),
    AuditKey(key=f"insula-audit-key:816:{'5e' * 32}"),
    HostStatus(
        version="0.1.0",
        hostname="rack1",
        kernel="6.1.0",
        started=_NOW,
        revision=815,
        tenants=1,
        networks=1,
        instances={"running": 1},
    ),
    Check(name="overlay", state="ok", detail="overlayfs with idmapped layers"),
    VerifyReport(passed=True, matrix=[], drift=[], seconds=0.1, classes=128_000),
    TraceView(
        source="web",
        target="db",
        source_address="10.0.0.2",
        target_address="10.0.0.3",
        service="tcp/5432",
        allowed=True,
        wanted=True,
        steps=["db (10.0.0.3) is on the same network", "no policy selects either end"],
    ),
    WhoIs(pid=4711, command="httpd", tenant="acme", instance="web", id="0123456789abcdef" * 2, inside=1),
)
EXAMPLES: dict[type, msgspec.Struct] = {type(each): each for each in _OBJECTS}


def example_of(hint: Any) -> Any:
    """Return an example of an annotated type as JSON values: an object, or a list with one; None if there is none."""
    if get_origin(hint) in (list, Sequence, tuple):
        item = example_of(get_args(hint)[0])
        return None if item is None else [item]
    for each in (hint, *get_args(hint)):
        if isinstance(each, type) and each in EXAMPLES:
            return _encoded(EXAMPLES[each])
    return None


def _encoded(example: msgspec.Struct) -> dict[str, Any]:
    """An example as JSON values; that of a request without what is the default."""
    values: dict[str, Any] = msgspec.to_builtins(example)
    if not type(example).__name__.endswith(("Spec", "Patch")):
        return values
    defaults = {field.encode_name: field.default for field in msgspec.structs.fields(example)}
    return {name: value for name, value in values.items() if value and value != defaults[name]}
