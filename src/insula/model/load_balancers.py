"""Layer-4 load balancers: addresses and ports whose connections are spread over instances that pass a check."""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, UnsetType

from insula.model import fields, rules
from insula.model.objects import Struct
from insula.model.policies import Selector

Affinity = Literal["none", "source"]
BackendState = Literal["healthy", "unhealthy", "starting", "stopped", "absent"]


class BalancerPort(Struct, kw_only=True):
    """A port that a load balancer listens on."""

    protocol: fields.TransportProtocol = "tcp"
    port: fields.PortNumber


class BalancerAddress(Struct, kw_only=True):
    """Where a load balancer is reached: at a floating address, at addresses of a network that no instance has, or with
    neither at an address of the host; None as address is every one of the host, or free ones of the network."""

    floating_ip: fields.Label | None = None
    network: fields.Label | None = None
    address: fields.IpAddress | None = None
    address6: fields.Address6 | None = None


class BackendCheck(Struct, kw_only=True):
    """How a backend is checked: by a TCP connection, by an HTTP request for `path` that is answered with a status from
    200 to 399, or not at all.

    `port` None is the backends' port. Times are in seconds. Of the last ``2 * threshold - 1`` results the majority
    decides; a new backend gets connections from its first success on.
    """

    kind: Literal["tcp", "http", "none"] = "tcp"
    port: fields.PortNumber | None = None
    path: Annotated[str, fields.schema(maxLength=rules.MAX_CHECK_PATH, examples=["/health"])] = "/"
    interval: fields.CheckSeconds = 5.0
    timeout: fields.CheckSeconds = 2.0
    threshold: Annotated[int, fields.schema(minimum=1, maximum=rules.MAX_THRESHOLD)] = 2


BalancerPorts = Annotated[list[BalancerPort], fields.at_most(rules.MAX_LISTENERS)]
BalancerAddresses = Annotated[list[BalancerAddress], fields.at_most(rules.MAX_LISTENERS)]
BackendNames = Annotated[list[fields.Label], fields.at_most(rules.MAX_BACKENDS)]


class LoadBalancer(Struct, kw_only=True):
    """A load balancer. Its backends are the instances that are named and those that `select` selects, of which the
    first ones by name count. `index` is unique on this cloud. `port` is that of the backends. With affinity
    "source" all connections of a client's address go to one backend."""

    tenant: str
    name: str
    index: int
    listen: list[BalancerPort]
    on: list[BalancerAddress]
    reached: list[BalancerAddress]  # `on` with the addresses that were chosen
    port: int
    select: Selector | None = None
    instances: list[str] = []
    affinity: Affinity = "none"
    health: BackendCheck = BackendCheck()
    labels: dict[str, str] = {}
    created: float


class HealthyBackends(Struct, kw_only=True):
    """The backends of a load balancer that pass its checks, as (ID of the instance, address). It is stored, so that
    they get connections while insulad starts again."""

    backends: list[tuple[str, str]] = []


class BackendView(Struct, kw_only=True):
    """One address of a backend: whether it gets connections, which it does if it is healthy, and why."""

    instance: str
    address: str | None = None
    port: int
    state: BackendState
    reason: str


class LoadBalancerView(Struct, kw_only=True):
    """A load balancer with the external and internal addresses that it is reached at, None being every address of the
    host, and with its backends."""

    tenant: str
    name: str
    listen: list[BalancerPort]
    on: list[BalancerAddress]
    port: int
    select: Selector | None
    instances: list[str]
    affinity: Affinity
    health: BackendCheck
    labels: dict[str, str]
    created: float
    addresses: list[str | None]
    backends: list[BackendView]


class LoadBalancerSpec(Struct, kw_only=True):
    """The request of `insula lb create`. Without a port of the backends it is that of the first listener. Without a
    check it is a TCP connection, or none if the balancer listens on UDP only."""

    name: fields.Label
    listen: BalancerPorts
    on: BalancerAddresses
    port: fields.PortNumber | None = None
    select: Selector | None = None
    instances: BackendNames = []
    affinity: Affinity = "none"
    health: BackendCheck | None = None
    labels: fields.Labels = {}


class LoadBalancerPatch(Struct, kw_only=True):
    """Changes of a load balancer, as a JSON merge patch. The addresses can't be changed."""

    listen: BalancerPorts | UnsetType = UNSET
    port: fields.PortNumber | UnsetType = UNSET
    select: Selector | UnsetType | None = UNSET
    instances: BackendNames | UnsetType = UNSET
    affinity: Affinity | UnsetType = UNSET
    health: BackendCheck | UnsetType = UNSET
