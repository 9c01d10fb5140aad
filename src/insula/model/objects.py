"""The objects of Insula, with wanted state (spec) and measured state (status).

Every object is a frozen struct; a change makes a new one (`msgspec.structs.replace`). A spec is the wanted state in the
store, a status is measured by a controller. Times are seconds since the epoch. Sizes are bytes. Addresses are strings
in canonical form (`ipaddress`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, dataclass_transform

import msgspec

from insula.model import fields, quotas, rules
from insula.model.disk_images import DevicesKind, DiskRoot
from insula.model.disks import FurtherDisk

IDS_PER_TENANT = 65536
"""The number of user and group IDs of each tenant on the host, from `Tenant.id_base` up (user_namespaces(7))."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """The base of all objects: immutable and strict about unknown fields (`kw_only` is not inherited)."""


# -- tenants ---------------------------------------------------------------------


if TYPE_CHECKING:

    class Limits(Struct):
        """The limits of a tenant as a whole, one field for each quota of `quotas.TABLE`; None is no limit. This is
        for type checkers: the struct itself is made of the table, which a test compares."""

        cpus: float | None = None
        memory: int | None = None
        pids: int | None = None
        bandwidth: int | None = None
        disk: int | None = None
        inodes: int | None = None
        instances: int | None = None
        networks: int | None = None
        ports: int | None = None
        routers: int | None = None
        policies: int | None = None
        address_groups: int | None = None
        published_ports: int | None = None
        floating_ips: int | None = None
        load_balancers: int | None = None
        images: int | None = None
        image_bytes: int | None = None
        config_bytes: int | None = None
        spec_bytes: int | None = None
        log_bytes: int | None = None
        service_accounts: int | None = None
        tokens: int | None = None
        exec_sessions: int | None = None
        streams: int | None = None
        upload_bytes: int | None = None
        requests: int | None = None

else:
    Limits = msgspec.defstruct(
        "Limits",
        [
            (quota.name, fields.limit(quota) | None, quota.default if quota.counted == "kernel" else None)
            for quota in quotas.TABLE
        ],
        bases=(Struct,),
        module=__name__,
        namespace={"__doc__": "The limits of a tenant as a whole; null is no limit."},
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )


class Tenant(Struct, kw_only=True):
    """A tenant: the owner of networks, images and instances, isolated from all others.

    `index` is a small number that is unique on this cloud. Names of devices on the host and `id_base` derive from it.
    """

    name: str
    index: int
    id_base: int
    limits: Limits = Limits()
    labels: dict[str, str] = {}
    created: float


# -- networks ---------------------------------------------------------------------


Outbound = Literal["nat", "none"]
"""The way out of a tenant's network: translated to the host's address (NAT), or none."""


class Network(Struct, kw_only=True):
    """A layer-2 segment of a tenant. The `gateway` addresses are the first of each subnet, and those of the tenant's
    routing domain. With `outbound` none its instances reach nothing outside of the tenant."""

    tenant: str
    name: str
    index: int  # unique on this cloud: names the bridge
    vni: int  # 24 bits, unique on this cloud (RFC 7348)
    subnet: str
    gateway: str
    subnet6: str | None = None
    gateway6: str | None = None
    mtu: int = 1500
    outbound: Outbound = "nat"
    labels: dict[str, str] = {}
    created: float


class NetworkStatus(Struct, kw_only=True):
    """The measured status of a network: `ready` is True if gateway and resolver work in the tenant's namespace."""

    ready: bool
    reason: str | None = None
    ports: int = 0


class AddressPair(Struct, kw_only=True):
    """Addresses that an instance may use at a port beside the port's own: a virtual address (VRRP, RFC 9568), or what a
    router appliance routes. None as MAC address is the port's."""

    address: fields.AddressRange
    mac: fields.Mac | None = None


class Port(Struct, kw_only=True):
    """The connection of one instance to one network. `index` is unique on this cloud: it names the host's device.

    `interface` is the name of the device inside, unique in the instance. A port that is to be "removed" stays until the
    instance's host has unplugged it.
    """

    tenant: str
    network: str
    instance: str
    index: int
    interface: str = "eth0"
    mac: str
    address: str
    address6: str | None = None
    allowed_pairs: list[AddressPair] = []
    wanted: Literal["plugged", "removed"] = "plugged"


# -- images ---------------------------------------------------------------------


class Healthcheck(Struct, kw_only=True):
    """The settings of a health check, Docker's extension of the image-spec (dockerfile, HEALTHCHECK).

    `test` is ``["CMD", program, argument…]``, ``["CMD-SHELL", line]``, or ``["NONE"]``: no check. Times are in seconds.
    None is the image's value, or else Docker's default. During `start_period` failures are not counted, and checks run
    every `start_interval`.
    """

    test: list[fields.ArgumentText] | None = None
    interval: fields.CheckSeconds | None = None
    timeout: fields.CheckSeconds | None = None
    retries: fields.CheckRetries | None = None
    start_period: fields.CheckStart | None = None
    start_interval: fields.CheckSeconds | None = None


class ImageConfig(Struct, kw_only=True):
    """The part of an OCI image configuration that a launch needs (image-spec, config.md)."""

    env: list[str] = []
    entrypoint: list[str] = []
    cmd: list[str] = []
    user: str = ""
    working_dir: str = "/"
    stop_signal: str = "SIGTERM"
    labels: dict[str, str] = {}
    volumes: list[str] = []
    exposed_ports: list[str] = []
    healthcheck: Healthcheck | None = None


class Image(Struct, kw_only=True):
    """A named image. `tenant` is the owner; "" is shared: every tenant may run it and none may change it.

    `layers` are the DiffIDs (sha256 of the uncompressed layer tar), lowest first. `notes` list for people what was left
    out of the image, such as device nodes. `content` is all that is stored for it, in bytes by digest: its manifest,
    configuration and layers as distributed, and ``layer/DIFFID`` for each extracted one (the size of its tar). A
    disk image has no layers but a `disk`.
    """

    tenant: str
    name: str  # repository:tag
    digest: str  # of the manifest, sha256:…
    config_digest: str
    layers: list[str]
    size: int
    config: ImageConfig
    architecture: str = "amd64"
    created: float
    notes: list[str] = []
    content: dict[str, int] = {}
    disk: DiskRoot | None = None


# -- requests ---------------------------------------------------------------------


class IdempotencyRecord(Struct, kw_only=True):
    """A request with an idempotency key: the `fingerprint` of its method, path, body and rights, and its answer, None
    until there is one. `made` is the ID of what an answer was about whose body is not kept, because it had a secret."""

    fingerprint: str
    created: float
    status: int | None = None
    media_type: str = ""
    body: bytes | None = None
    made: str | None = None


# -- instances ---------------------------------------------------------------------


class RestartPolicy(Struct, kw_only=True):
    """The policy for restarts when the instance's PID 1 exits by itself, as docker-run(1) --restart."""

    name: Literal["no", "on-failure", "always", "unless-stopped"] = "no"
    max_retries: fields.Restarts = 0  # of on-failure; 0 is without limit


class Resources(Struct, kw_only=True):
    """Limits of one instance; None is no limit except the tenant's. `disk` (bytes) and `inodes` limit what it writes
    into its root file system."""

    cpus: fields.Cpus | None = None
    memory: fields.Memory | None = None
    pids: fields.Pids | None = 4096
    disk: fields.Disk | None = None
    inodes: fields.Inodes | None = None


class Rlimit(Struct, kw_only=True):
    """A resource limit (getrlimit(2)); `name` is that of RLIMIT_NOFILE and so on without the prefix, in lower case."""

    name: fields.RlimitName
    soft: fields.RlimitValue
    hard: fields.RlimitValue


class TmpfsMount(Struct, kw_only=True, tag_field="type", tag="tmpfs"):
    """A tmpfs inside the instance; `size` is in bytes. `mode`, `uid` and `gid` are those of its root directory, with
    IDs as inside the instance. Set-uid programs and devices have no effect in it."""

    path: fields.TmpfsPath
    size: fields.Bytes = 64 << 20
    mode: fields.TmpfsMode = 0o1777
    uid: fields.Id = 0
    gid: fields.Id = 0
    executable: bool = False
    read_only: bool = False


Mount = TmpfsMount
"""A further mount of an instance: a tagged union by `type`, to which volumes will be added."""


class ContainerOptions(Struct, kw_only=True, tag_field="kind", tag="container"):
    """The options of containers only."""

    init: bool = False
    shm_size: fields.Bytes = 64 << 20  # of /dev/shm
    group_add: fields.GroupNames = []  # supplementary groups, names of the image or numbers
    rlimits: list[Rlimit] = []
    cap_add: list[fields.Capability] = []
    cap_drop: list[fields.Capability] = []
    sysctls: fields.Sysctls = {}
    pid_of: fields.Label | None = None  # the instance whose PID namespace it shares, `--pid container:NAME`
    nesting: bool = False  # containers may run inside
    socket_families: list[fields.SocketFamily] = []  # beside UNIX, INET, INET6 and NETLINK, as in "packet"
    aio: bool = False  # allow io_setup(2), which uses contexts from the host's limit


class MachineOptions(Struct, kw_only=True, tag_field="kind", tag="machine"):
    """The options of virtual machines only. `cold` boots the machine instead of copying one that was booted, and with
    `privileged` root has all rights on the guest's kernel. The others are for disk images: their `devices` (None: those
    of the image), what cloud-init is told, and a CD."""

    cold: bool = False
    group_add: fields.GroupNames = []  # as of containers
    privileged: bool = False
    devices: DevicesKind | None = None
    user_data: fields.UserData | None = None  # as it is, for example a #cloud-config
    ssh_keys: fields.SshKeys = []  # of the default user, as in authorized_keys (sshd(8))
    cdrom: fields.ImageReference | None = None  # an image of a CD, which is in a drive
    disks: Annotated[list[FurtherDisk], fields.at_most(rules.MAX_DISKS)] = []

    @property
    def pid_of(self) -> None:
        """A machine shares its processes with nobody."""
        return None


Options = ContainerOptions | MachineOptions
"""The options of one kind: a tagged union by `kind`, the driver's name."""


class HostEntry(Struct, kw_only=True):
    """A line of /etc/hosts (hosts(5))."""

    name: fields.Domain
    address: fields.IpAddress


class ConsoleSize(Struct, kw_only=True):
    """The size of a terminal in characters, as `process.consoleSize` of the OCI runtime-spec; each at most 65535."""

    rows: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    columns: Annotated[int, msgspec.Meta(ge=0, le=65535)]


class NetworkAttachment(Struct, kw_only=True):
    """A network that an instance is connected to. None is a free address, and a MAC address made of it."""

    network: fields.Label
    address: fields.Address4 | None = None
    address6: fields.Address6 | None = None
    mac: fields.Mac | None = None
    allowed_pairs: Annotated[list[AddressPair], fields.at_most(rules.MAX_ADDRESS_PAIRS)] = []


def _default_networks() -> list[NetworkAttachment]:
    return [NetworkAttachment(network="default")]


class PublishedPort(Struct, kw_only=True):
    """Ports of an external address that lead to an instance: packets to them are translated (DNAT, RFC 3022).

    There are `count` of them from `port` up, which lead to as many ports of the instance from `target` up. `address` is
    an address of the host or a floating one; None is every address of the host, its loopback addresses included.
    """

    port: fields.PortNumber
    target: fields.PortNumber
    count: fields.PortNumber = 1
    protocol: fields.TransportProtocol = "tcp"
    address: fields.IpAddress | None = None

    @property
    def last(self) -> int:
        """The last external port."""
        return self.port + self.count - 1


class InstanceSpec(Struct, kw_only=True):
    """The spec of an instance, as in `insula run`. Empty or None means the image's value, or the default."""

    name: fields.OptionalLabel = ""
    image: fields.ImageReference
    networks: Annotated[list[NetworkAttachment], fields.at_most(rules.MAX_PORTS)] = msgspec.field(
        default_factory=_default_networks
    )  # none: loopback only
    published: Annotated[list[PublishedPort], fields.at_most(rules.MAX_PUBLISHED)] = []  # to its first address
    command: list[fields.ArgumentText] = []  # replaces the image's cmd
    entrypoint: list[fields.ArgumentText] | None = None
    env: fields.Environment = {}
    user: fields.UserName | None = None
    working_dir: fields.WorkingDirectory | None = None
    hostname: fields.Hostname | None = None
    labels: fields.Labels = {}
    stop_signal: fields.Signal | None = None
    stop_timeout: fields.StopTimeout = 10.0
    tty: bool = False
    stdin: bool = False  # keep the standard input open, `-i`
    read_only: bool = False
    mounts: Annotated[list[Mount], fields.at_most(rules.MAX_MOUNTS)] = []
    extra_hosts: Annotated[list[HostEntry], fields.at_most(rules.MAX_HOSTS)] = []
    dns: fields.NameServers = []  # name servers instead of the network's, resolv.conf(5)
    dns_search: fields.SearchDomains = []  # search domains instead of the tenant's; ["."] is none
    resources: Resources = Resources()
    restart: RestartPolicy = RestartPolicy()
    remove: bool = False  # `--rm`
    healthcheck: Healthcheck | None = None
    log_size: fields.LogSize = 10 << 20
    log_files: fields.LogFiles = 3
    options: Options = msgspec.field(default_factory=ContainerOptions)

    @property
    def kind(self) -> str:
        """The name of its driver."""
        return str(self.options.__struct_config__.tag)


class OverlayRoot(Struct, kw_only=True, tag_field="type", tag="overlay"):
    """A root file system made of an image's layers and a writable one on top. `layers` are DiffIDs, lowest first."""

    layers: list[str]


Root = OverlayRoot | DiskRoot
"""A tagged union by `type`."""


class Instance(Struct, kw_only=True):
    """The wanted state of an instance. `id` has 32 hex digits and is unique; `wanted` is the state that the user wants.

    `generation` increases with every change of the wanted state, as `metadata.generation` in Kubernetes. `starts`
    increases with every start by the user: a run of an earlier one is to be replaced. `stop_timeout` belongs to
    `wanted`: seconds between the stop signal and SIGKILL, None for the spec's.
    """

    tenant: str
    name: str
    id: str
    host: str
    spec: InstanceSpec
    image_digest: str
    config: ImageConfig
    root: Root
    ports: list[Port] = []
    project_id: int | None = None  # of what it writes, for disk quotas (quotactl(2)); None where there are none
    wanted: Literal["running", "paused", "stopped", "removed"]
    stop_timeout: float | None = None
    generation: int = 1
    starts: int = 0
    cold_start: int | None = None  # the start that boots a machine, whatever it could go on from
    ticket: str = ""  # the SHA-256 of the secret of that by which it came from another host
    arriving: bool = False  # it comes, and is the other host's until it has arrived
    created: float

    @property
    def images(self) -> set[str]:
        """The digests of the manifests of all images that it uses."""
        cds = self.root.cds if isinstance(self.root, DiskRoot) else ()
        return {self.image_digest, *(each.image for each in cds if each and each.image)}

    @property
    def port(self) -> Port | None:
        """The first port, which has the default route; None without a network."""
        return next(iter(self.plugged), None)

    @property
    def plugged(self) -> list[Port]:
        """The ports that are wanted, in the order of their interfaces."""
        return [port for port in self.ports if port.wanted == "plugged"]


class Exit(Struct, kw_only=True):
    """The end of PID 1: `exit_status` as in a shell (128 + signal if it was killed); None if it is unknown."""

    exit_status: int | None
    signal: int | None = None
    oom: bool = False
    finished: float


class InstanceStatus(Struct, kw_only=True):
    """The status of an instance, measured by its controller."""

    state: Literal["created", "starting", "running", "paused", "stopping", "exited", "failed"]
    observed_generation: int = 0  # the observed generation: it was reached, or failed with `error`
    starts: int = 0  # the start that this status belongs to
    pid: int | None = None  # on the host; 1 inside
    start_time: int | None = None  # field 22 of proc_pid_stat(5): with the PID it identifies the process
    started: float | None = None
    exit: Exit | None = None
    error: str | None = None
    hint: str | None = None
    error_kind: str | None = None  # its class, as in model/errors.py
    error_exit: int | None = None  # what `insula run` exits with because of it, if that is not 125
    restarts: int = 0  # since the user started it
    backoff: int = 0  # of these, the last ones without a stable run in between
    next_start: float | None = None  # when its restart policy has it started again, after it ended or failed
    resources: Resources | None = None  # the applied limits, while it runs
    notes: list[str] = []  # what is not as they say yet, as text
    ports: list[int] = []  # the indices of the ports that are plugged in, while it runs
    disks: list[str] = []  # the further disks that it has, while it runs


def disks_of(spec: InstanceSpec) -> list[FurtherDisk]:
    """The further disks of an instance; none if it is no virtual machine."""
    return spec.options.disks if isinstance(spec.options, MachineOptions) else []


class InstanceEvent(Struct, kw_only=True):
    """An event of an instance that is not a change of its state: a killed process, a change of its health."""

    time: float
    action: str
    details: dict[str, str | int | float | bool | None] = {}
