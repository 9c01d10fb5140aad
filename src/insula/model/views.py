"""The responses and requests of the API: views, which join an object's wanted and measured state, and reports.

Views are not stored.
"""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from insula.model import fields, rules
from insula.model.objects import (
    ConsoleSize,
    Instance,
    InstanceStatus,
    Network,
    NetworkStatus,
    Outbound,
    PublishedPort,
    Struct,
    Tenant,
)
from insula.model.quotas import NOW, STORED, TABLE

if TYPE_CHECKING:

    class Usage(Struct):
        """What a tenant has of each quota that is counted: sums over its objects, and what its open requests hold."""

        def __init__(self, **used: float | int) -> None: ...

        def __getattr__(self, name: str) -> float: ...

    class LimitsPatch(Struct):
        """Changes of a tenant's `Limits`, as a JSON merge patch (RFC 7396): absent fields stay, null is no limit."""

        def __init__(self, **limits: float | int | None) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    class TenantPatch(LimitsPatch):
        """Changes of a tenant, as a JSON merge patch: limits, and labels, of which null removes one."""

        labels: dict[str, str | None] | UnsetType

        def __init__(
            self, *, labels: dict[str, str | None] | UnsetType = UNSET, **limits: float | int | None
        ) -> None: ...

else:
    _OPTIONS = {"bases": (Struct,), "module": __name__, "frozen": True, "kw_only": True, "forbid_unknown_fields": True}
    Usage = msgspec.defstruct(
        "Usage",
        [(quota.name, int, 0) if quota.whole else (quota.name, float, 0.0) for quota in (*STORED, *NOW)],
        namespace={"__doc__": "What a tenant has of each quota that is counted."},
        **_OPTIONS,
    )
    LimitsPatch = msgspec.defstruct(
        "LimitsPatch",
        [(quota.name, fields.limit(quota) | UnsetType | None, UNSET) for quota in TABLE],
        namespace={"__doc__": "Limits of a tenant: null is no limit, absent is the default, or the limit of now."},
        **_OPTIONS,
    )
    TenantPatch = msgspec.defstruct(
        "TenantPatch",
        [("labels", dict[fields.LabelName, fields.LabelValue | None] | UnsetType, UNSET)],
        namespace={
            "__doc__": "Changes of a tenant: limits, of which null is none, and labels, of which null removes one."
        },
        **(_OPTIONS | {"bases": (LimitsPatch,)}),
    )


class DiskView(Struct, kw_only=True):
    """What an instance, or all of a tenant, has written into root file systems: bytes and inodes as the file system
    counts them, with those of deleted files that are still open. None is not counted, or no limit. `enforced`: the
    kernel refuses to write more."""

    used: int | None
    limit: int | None
    inodes: int | None
    inodes_limit: int | None
    enforced: bool


class TenantView(Struct, kw_only=True):
    tenant: Tenant
    usage: Usage
    disk: DiskView | None = None  # in the answer for one tenant


class NetworkView(Struct, kw_only=True):
    network: Network
    status: NetworkStatus


class HealthCheckResult(Struct, kw_only=True):
    """The result of one health check; its exit status is None if it was killed. `output` is truncated."""

    started: float
    finished: float
    exit_status: int | None
    output: str


class Health(Struct, kw_only=True):
    """The results of health checks since the instance or `insulad` started. `log` has the last five."""

    status: Literal["starting", "healthy", "unhealthy"]
    failures: int = 0  # in a row
    log: list[HealthCheckResult] = []


class InstanceView(Struct, kw_only=True):
    instance: Instance
    status: InstanceStatus
    restarting: bool = False  # it has ended, and will be restarted after a delay
    health: Health | None = None  # None without checks, and while it doesn't run
    responsive: bool = True  # False while a virtual machine that runs does not answer
    reconciled: bool = True  # False until insulad has observed it after a start of the daemon: the status may be old


# -- requests ------------------------------------------------------------------------------------------------------


class TenantSpec(Struct, kw_only=True):
    """The request of `insula tenant create`."""

    name: fields.Label
    limits: LimitsPatch = LimitsPatch()
    labels: fields.Labels = {}


class ResourcesPatch(Struct, kw_only=True):
    """Changes of an instance's `Resources`, as a JSON merge patch."""

    cpus: fields.Cpus | UnsetType | None = UNSET
    memory: fields.Memory | UnsetType | None = UNSET
    pids: fields.Pids | UnsetType | None = UNSET
    disk: fields.Disk | UnsetType | None = UNSET
    inodes: fields.Inodes | UnsetType | None = UNSET


class InstancePatch(ResourcesPatch, kw_only=True):
    """Changes of an instance while it runs, as a JSON merge patch: a label with the value null is removed. A `cdrom` is
    the image of a CD that is put into the drive of a virtual machine; with null all CDs are taken out of its drives,
    which stay."""

    labels: dict[fields.LabelName, fields.LabelValue | None] | UnsetType = UNSET
    cdrom: fields.ImageReference | UnsetType | None = UNSET


class PublishedPatch(Struct, kw_only=True):
    """A change of an instance's published ports: what is withdrawn is as it was published."""

    publish: Annotated[list[PublishedPort], fields.at_most(rules.MAX_PUBLISHED)] = []
    withdraw: Annotated[list[PublishedPort], fields.at_most(rules.MAX_PUBLISHED)] = []


class NetworkSpec(Struct, kw_only=True):
    """The request of `insula network create`."""

    name: fields.Label
    subnet: fields.Subnet4
    subnet6: fields.Subnet6 | None = None
    mtu: fields.Mtu = 1500
    outbound: Outbound = "nat"
    labels: fields.Labels = {}


class NetworkPatch(Struct, kw_only=True):
    """Changes of a network, as a JSON merge patch."""

    outbound: Outbound | UnsetType = UNSET


class Credentials(Struct, kw_only=True):
    """The login at a registry."""

    username: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    password: Annotated[str, msgspec.Meta(max_length=4096)]

    def __repr__(self) -> str:
        return f"Credentials({self.username!r})"  # never the password


class ExecSpec(Struct, kw_only=True):
    """The request for a further process in a running instance; None means the value of the instance's PID 1."""

    command: fields.ArgumentVector
    env: fields.Environment = {}
    user: fields.UserName | None = None
    working_dir: fields.WorkingDirectory | None = None
    tty: bool = False
    stdin: bool = False
    console_size: ConsoleSize | None = None  # of the terminal at the start of the process


class Started(Struct, kw_only=True):
    """A process that was started in an instance in the background."""

    id: str


# -- reports -------------------------------------------------------------------------------------------------------


class InstanceStats(Struct, kw_only=True):
    """The usage of an instance. Counters start at its start; None if a value isn't counted, or it doesn't run."""

    tenant: str
    name: str
    state: str
    cpu: float | None = None  # CPUs in use, on average since the previous sample, as in 1.5
    cpu_limit: float | None = None  # its own, or else the tenant's; so are the others
    cpu_time: int | None = None  # nanoseconds
    throttled: int | None = None  # nanoseconds that it was throttled
    memory: int | None = None  # bytes, without inactive page cache
    memory_limit: int | None = None
    pids: int | None = None  # processes and threads
    pids_limit: int | None = None
    received: int | None = None  # bytes through its port
    sent: int | None = None
    read: int | None = None  # bytes from and to block devices
    written: int | None = None
    disk: int | None = None  # bytes that its own files take, as the file system counts them for its quota
    disk_limit: int | None = None
    pressure: dict[str, dict[str, float]] = {}  # cpu, memory, io → some, full: percent of the last 10 s; cgroup v2


class StatsSample(Struct, kw_only=True):
    """The usage of several instances at one time."""

    time: float
    instances: list[InstanceStats]


class ProcessView(Struct, kw_only=True):
    """One process of an instance. `pids` are its numbers from the host's PID namespace inward (pid_namespaces(7))."""

    pid: int  # on the host
    inside: int  # in the instance's own PID namespace
    pids: list[int]
    parent: int  # inside; 0 when the parent is outside
    uid: int  # on the host
    user: int | None  # inside; None if the instance's user namespace doesn't map it
    state: str
    cpu: float = 0.0  # seconds of processor time so far
    command: str


class WhoIs(Struct, kw_only=True):
    """The owner of a process on the host. Without an instance it is a process of the host itself."""

    pid: int
    command: str
    tenant: str | None = None
    instance: str | None = None
    id: str | None = None
    inside: int | None = None
    pids: list[int] = []


class Check(Struct, kw_only=True):
    """The result of one check of `insula doctor`; if it isn't ok, with its consequence and a hint."""

    name: str
    state: Literal["ok", "degraded", "missing", "unknown"]
    detail: str
    consequence: str | None = None
    hint: str | None = None


class AuditHead(Struct, kw_only=True):
    """The end of the audit log: number and hash of its last line, as ``17:HASH``; and the same as the store has it."""

    head: str
    stored: str | None = None


class AuditKey(Struct, kw_only=True):
    """A key that verifies the lines of the audit log from one number on. It is shown once."""

    key: str


class HostStatus(Struct, kw_only=True):
    """A summary of this host. `problems` are errors that controllers could not repair, as text."""

    version: str
    hostname: str
    kernel: str
    started: float
    revision: int
    tenants: int
    networks: int
    instances: dict[str, int]  # by state
    reconciling: int = 0  # instances that insulad has not observed yet since it started
    problems: list[str] = []


class Reachability(Struct, kw_only=True):
    """One cell of the matrix of `insula verify`: whether `source` may reach `target`, and whether it does.

    Names are ``tenant/instance``, ``host`` or ``outside``. `probed` is None if the result is unknown. `control` is True
    if the positive controls of source and target worked.
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


class VerifyFinding(Struct, kw_only=True):
    """A way in which what the kernel lets pass differs from what it should.

    A ``leak`` lets packets come where they may not, ``blocked`` keeps them from where they should, ``forged`` lets an
    instance send from an address that is not its own, ``overheard`` gives an instance frames for others, and
    ``unknown`` is something that is not understood, which counts as if it let everything pass. `classes` is the number
    of packet classes that it is about. The `witness` is one packet of them; `sent` tells where that was seen last when
    it was sent, None if it was not.
    """

    kind: str
    tenant: str
    source: str
    target: str
    text: str
    classes: int
    witness: str | None = None
    sent: str | None = None


class VerifyReport(Struct, kw_only=True):
    """The report of `insula verify`; it passes if nothing differs from the tenants' networks.

    `classes` is the number of packet classes, of all sources, destinations and services, for which it was proven that
    the installed rules treat them as they should, except in `findings`. `matrix` has what real packets did. `repaired`
    tells what was installed again before. `ports` is the number of instances' ports, all of which the proof is about,
    and `probed_ports` the number of those between which packets were sent: a sample if there are many.
    """

    passed: bool
    matrix: list[Reachability]
    drift: list[str]
    seconds: float
    findings: list[VerifyFinding] = []
    classes: int = 0
    repaired: list[str] = []
    ports: int = 0
    probed_ports: int = 0


class Namespace(Struct, kw_only=True):
    """A namespace of an instance; `shared` if it is the host's. `instances` are others of its tenant that share it, as
    with ``--pid container:NAME``."""

    kind: str
    inode: int
    shared: bool
    instances: list[str] = []


class Layer(Struct, kw_only=True):
    digest: str
    path: str


class Explanation(Struct, kw_only=True):
    """The isolation of an instance, read from the kernel if it runs."""

    instance: Instance
    status: InstanceStatus
    processes: list[ProcessView]
    namespaces: list[Namespace]
    uid_map: str | None
    cgroups: dict[str, str]  # controller → path
    limits: dict[str, str]  # file → content
    tenant_limits: dict[str, str] = {}  # of the tenant's control group, for all of its instances
    security: dict[str, str]  # seccomp, capabilities, no_new_privs from proc_pid_status(5)
    layers: list[Layer]
    upper: str
    entrances: list[str] = []  # published ports, floating addresses and load balancers that lead to it, in words
    installed: list[dict[str, object]] = []  # its ports, as they are in the kernel
    rules: str | None
    health: Health | None = None
    disk: DiskView | None = None
    pressure: dict[str, str] = {}  # file of the control group → its "some" line (Documentation/accounting/psi.rst)
