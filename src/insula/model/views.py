"""What the API answers: objects together with what was measured about them, and reports.

A view joins what the store holds as wanted with what reconcilers measured; nobody stores a view.
"""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from insula.model.objects import (
    ConsoleSize,
    Instance,
    InstanceStatus,
    Limits,
    Network,
    NetworkStatus,
    Struct,
    Tenant,
)


class Usage(Struct, kw_only=True):
    """What a tenant has reserved: the sums over its instances, running or not."""

    instances: int = 0
    cpus: float = 0.0
    memory: int = 0


class TenantView(Struct, kw_only=True):
    tenant: Tenant
    usage: Usage


class NetworkView(Struct, kw_only=True):
    network: Network
    status: NetworkStatus


class Probe(Struct, kw_only=True):
    """One health check that was made: None is the exit status of one that had to be killed. `output` is bounded."""

    started: float
    finished: float
    exit_status: int | None
    output: str


class Health(Struct, kw_only=True):
    """What health checks found since the instance started, or since `insulad` did. `log` has the last five."""

    status: Literal["starting", "healthy", "unhealthy"]
    failures: int = 0  # in a row
    log: list[Probe] = []


class InstanceView(Struct, kw_only=True):
    instance: Instance
    status: InstanceStatus
    restarting: bool = False  # it has ended, and will start again after a pause
    health: Health | None = None  # None without checks, and while it doesn't run
    reconciled: bool = True  # False after a start of insulad, until it was looked at: the status is of before


# -- requests that are no objects ----------------------------------------------------------------------------------


class TenantSpec(Struct, kw_only=True):
    """What a user asks for with `insula tenant create`."""

    name: str
    limits: Limits = Limits()
    labels: dict[str, str] = {}


class LimitsPatch(Struct, kw_only=True):
    """What is to change of a tenant's `Limits`, as a JSON merge patch (RFC 7396): absent stays, null is no limit."""

    cpus: float | UnsetType | None = UNSET
    memory: int | UnsetType | None = UNSET
    pids: int | UnsetType | None = UNSET
    instances: int | UnsetType | None = UNSET
    bandwidth: int | UnsetType | None = UNSET


class ResourcesPatch(Struct, kw_only=True):
    """What is to change of an instance's `Resources`, in the same way."""

    cpus: float | UnsetType | None = UNSET
    memory: int | UnsetType | None = UNSET
    pids: int | UnsetType | None = UNSET


class NetworkSpec(Struct, kw_only=True):
    """What a user asks for with `insula network create`."""

    name: str
    subnet: str
    subnet6: str | None = None
    mtu: int = 1500
    labels: dict[str, str] = {}


class ExecSpec(Struct, kw_only=True):
    """One more process in a running instance; None means as the instance's PID 1 has it."""

    command: list[str]
    env: dict[str, str] = {}
    user: str | None = None
    working_dir: str | None = None
    tty: bool = False
    stdin: bool = False
    console_size: ConsoleSize | None = None  # of the terminal when the process begins


class Started(Struct, kw_only=True):
    """A process that was started in an instance and left alone."""

    id: str


# -- reports -------------------------------------------------------------------------------------------------------


class InstanceStats(Struct, kw_only=True):
    """What an instance uses. Counters count from its start; None is what nobody counts, or of one that doesn't run."""

    tenant: str
    name: str
    state: str
    cpu: float | None = None  # CPUs in use, on average since the sample before: 1.5 is one and a half
    cpu_limit: float | None = None  # its own, or else the tenant's; so are the others
    cpu_time: int | None = None  # nanoseconds
    throttled: int | None = None  # nanoseconds that it waited because of its limit
    memory: int | None = None  # bytes, without page cache that is given back at once
    memory_limit: int | None = None
    pids: int | None = None  # processes and threads
    pids_limit: int | None = None
    received: int | None = None  # bytes through its port
    sent: int | None = None
    read: int | None = None  # bytes from and to block devices
    written: int | None = None
    pressure: dict[str, dict[str, float]] = {}  # cpu, memory, io → some, full: percent of the last 10 s; cgroup v2


class StatsSample(Struct, kw_only=True):
    """All that was asked for, at one time."""

    time: float
    instances: list[InstanceStats]


class ProcessView(Struct, kw_only=True):
    """One process of an instance. `pids` are its numbers from the host's PID namespace inward (pid_namespaces(7))."""

    pid: int  # on the host
    inside: int  # in the instance's own PID namespace
    pids: list[int]
    parent: int  # inside; 0 when the parent is outside
    uid: int  # on the host
    user: int | None  # inside; None when the instance doesn't map it
    state: str
    cpu: float = 0.0  # seconds of processor time so far
    command: str


class WhoIs(Struct, kw_only=True):
    """To whom a host process belongs. Without an instance it is the host's own."""

    pid: int
    command: str
    tenant: str | None = None
    instance: str | None = None
    id: str | None = None
    inside: int | None = None
    pids: list[int] = []


class Check(Struct, kw_only=True):
    """One thing that `insula doctor` looked at. Unless it is ok: what follows, and what helps."""

    name: str
    state: Literal["ok", "degraded", "missing", "unknown"]
    detail: str
    consequence: str | None = None
    hint: str | None = None


class HostStatus(Struct, kw_only=True):
    """This host at a glance. `problems` are what reconcilers could not repair, as text."""

    version: str
    hostname: str
    kernel: str
    started: float
    revision: int
    tenants: int
    networks: int
    instances: dict[str, int]  # by state
    reconciling: int = 0  # instances that were not looked at yet since insulad started
    problems: list[str] = []


class Reachability(Struct, kw_only=True):
    """One cell of the matrix of `insula verify`: may `source` reach `target`, and does it?

    Names are ``tenant/instance``, ``host`` or ``outside``. `probed` is None where no packet could be sent;
    `control` tells whether the probe is known to have worked (a positive control on the same path succeeded).
    """

    source: str
    target: str
    address: str
    expected: bool
    installed: bool
    probed: bool | None = None
    control: bool = False
    detail: str | None = None

    @property
    def ok(self) -> bool:
        return self.installed == self.expected and self.probed in (None, self.expected)


class VerifyReport(Struct, kw_only=True):
    """What `insula verify` found; it passes when nothing differs from what the tenants asked for."""

    passed: bool
    matrix: list[Reachability]
    drift: list[str]
    seconds: float


class Namespace(Struct, kw_only=True):
    """A namespace of an instance; `shared` when the host's processes are in it as well. `instances` are the others
    of its tenant that are in it, as with ``--pid container:NAME``."""

    kind: str
    inode: int
    shared: bool
    instances: list[str] = []


class Layer(Struct, kw_only=True):
    digest: str
    path: str


class Explanation(Struct, kw_only=True):
    """What makes an instance isolated, read from the kernel where it runs."""

    instance: Instance
    status: InstanceStatus
    processes: list[ProcessView]
    namespaces: list[Namespace]
    uid_map: str | None
    cgroups: dict[str, str]  # controller → path
    limits: dict[str, str]  # file → content
    tenant_limits: dict[str, str] = {}  # the same of the control group above, for all of the tenant's instances
    security: dict[str, str]  # seccomp, capabilities, no_new_privs from proc_pid_status(5)
    layers: list[Layer]
    upper: str
    device: str | None  # on the tenant's bridge
    installed: dict[str, object] | None  # the port as the fabric reads it back
    rules: str | None
    health: Health | None = None
    pressure: dict[str, str] = {}  # file of the control group → its "some" line (Documentation/accounting/psi.rst)
