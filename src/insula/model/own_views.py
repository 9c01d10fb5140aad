"""Views for tenants of their own objects, without numbers of the host and of other tenants.

Indices, VNIs, ID ranges, PIDs on the host, paths and names of hosts would reveal other tenants and their activity, or
help an attacker. Each struct here has those fields of its full form that its owner may know; a new field of the full
form is not shown until it is added here. `narrow` makes them.
"""

from __future__ import annotations

from typing import Literal

from insula.model.objects import (
    AddressPair,
    Exit,
    ImageConfig,
    InstanceSpec,
    Limits,
    NetworkStatus,
    Outbound,
    Resources,
    Struct,
)
from insula.model.views import DiskView, Health, Usage

HIDDEN = "…"
"""The text that replaces the value of an environment variable."""


class OwnTenant(Struct, kw_only=True):
    name: str
    limits: Limits
    labels: dict[str, str]
    created: float


class OwnTenantView(Struct, kw_only=True):
    tenant: OwnTenant
    usage: Usage
    disk: DiskView | None


class OwnNetwork(Struct, kw_only=True):
    tenant: str
    name: str
    subnet: str
    gateway: str
    subnet6: str | None
    gateway6: str | None
    mtu: int
    outbound: Outbound
    labels: dict[str, str]
    created: float


class OwnNetworkView(Struct, kw_only=True):
    network: OwnNetwork
    status: NetworkStatus


class OwnPort(Struct, kw_only=True):
    tenant: str
    network: str
    instance: str
    interface: str
    mac: str
    address: str
    address6: str | None
    allowed_pairs: list[AddressPair]
    wanted: Literal["plugged", "removed"]


class OwnInstance(Struct, kw_only=True):
    tenant: str
    name: str
    id: str
    spec: InstanceSpec
    image_digest: str
    config: ImageConfig
    ports: list[OwnPort]
    wanted: Literal["running", "paused", "stopped", "removed"]
    stop_timeout: float | None
    generation: int
    starts: int
    created: float


class OwnInstanceStatus(Struct, kw_only=True):
    state: Literal["created", "starting", "running", "paused", "stopping", "exited", "failed"]
    observed_generation: int
    starts: int
    started: float | None
    exit: Exit | None
    error: str | None
    hint: str | None
    restarts: int
    backoff: int
    next_start: float | None
    resources: Resources | None


class OwnInstanceView(Struct, kw_only=True):
    instance: OwnInstance
    status: OwnInstanceStatus
    restarting: bool
    health: Health | None
    responsive: bool
    reconciled: bool


class OwnProcess(Struct, kw_only=True):
    """One process of an instance. `pids` are its numbers from the instance's PID namespace inward."""

    inside: int
    pids: list[int]
    parent: int
    user: int | None
    state: str
    cpu: float
    command: str


class OwnNamespace(Struct, kw_only=True):
    kind: str
    shared: bool
    instances: list[str]


class OwnLayer(Struct, kw_only=True):
    digest: str


class OwnExplanation(Struct, kw_only=True):
    instance: OwnInstance
    status: OwnInstanceStatus
    processes: list[OwnProcess]
    namespaces: list[OwnNamespace]
    layers: list[OwnLayer]
    limits: dict[str, str]
    security: dict[str, str]
    entrances: list[str]
    health: Health | None
    disk: DiskView | None
    pressure: dict[str, str]
