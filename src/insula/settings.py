"""The settings of insulad: the file /etc/insula/insulad.toml, and environment variables over it (insulad.toml(5)).

Reading is strict: an unknown key, or a value of another type or out of bounds, raises `Invalid` with the file or the
variable. `DOCUMENTED` describes each setting; the man page is made from it, and tests compare it with docs/settings.md
and packaging/insulad.toml.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import msgspec

from insula.model import quotas
from insula.model.errors import Invalid
from insula.model.machine_settings import MachineSettings, check_machines
from insula.model.network_settings import NetworkSettings, check_network
from insula.model.oidc import DESCRIPTIONS, OidcSettings, check_providers
from insula.model.quota_settings import USERS, QuotaSettings, limit, takes
from insula.model.units import parse_size, shorten

FILE = Path("/etc/insula/insulad.toml")
ENVIRONMENT = {
    "INSULA_ROOT": "root",
    "INSULA_RUN": "run",
    "INSULA_SOCKET": "socket",
    "INSULA_PREFIX": "prefix",
    "INSULA_SPARES": "spares",
    "INSULA_LOG_LEVEL": "log_level",
}
"""Variables that override the file. INSULA_CONFIG names another file."""
OPERATORS = "insula"
"""The group of the host whose members are operators, as root is."""
LEVELS = ("error", "warning", "info", "debug")
_MANUAL = "see insulad.toml(5)"
_MAX_FILE = 1 << 20
_PREFIX = re.compile(r"[a-z][a-z0-9]{0,7}")
_EXPECTED = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<where>.*)`)?", re.DOTALL)
_MAX_SPARES = 32
_MAX_LISTEN = 16
_MAX_NAMES = 64
_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}|[0-9]{1,9}")
_LEAST_AUDIT = 64 << 10  # bytes of an audit log before it is rotated
_MAX_AUDIT_FILES = 1000
_LEAST_POOL = {"ext4": 16 << 20, "xfs": 300 << 20}  # bytes; mkfs.xfs(8) refuses less
_LEAST_DISK = 1 << 20  # bytes


class AuditSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[audit]`: the audit log, rotated at `size` bytes (0: never); `files` older ones are kept. `witness` is a file to
    which heads of its chain are appended; "" is none."""

    path: str = "/var/log/insula/audit.log"
    size: str = "16m"
    files: int = 9
    witness: str = ""

    @property
    def size_bytes(self) -> int:
        return 0 if self.size == "0" else parse_size(self.size)


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[api]`: HTTPS. `listen` are addresses with ports; none is off. `names` are further names of this host, for its
    certificate. `user` is the user that TLS runs as, a name or a number: nothing else may run as it."""

    listen: list[str] = []
    names: list[str] = []
    user: str = "insula-gate"


class StorageSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage]`: the disk of instances. `pool` is the size of a file system of their own, made in the format
    `format`; "0" makes none. `disk` is the limit of an instance without one, if its tenant has one. Nothing is created
    while less than `reserve`, or a twentieth of the file system, is free."""

    pool: str = "0"
    format: Literal["ext4", "xfs"] = "ext4"
    disk: str = "1g"
    reserve: str = "1g"

    @property
    def pool_bytes(self) -> int | None:
        return parse_size(self.pool) or None

    @property
    def disk_bytes(self) -> int:
        return parse_size(self.disk)

    @property
    def reserve_bytes(self) -> int:
        return parse_size(self.reserve)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings. The directory `root` is persistent, `run` is empty after a reboot. `prefix` is the prefix of names
    in the kernel: network namespaces, nftables tables, the parent control group. `spares` is the number of warm
    containers for each tenant that launches instances. `fabric` is a name in `control.networks.fabrics`. `ebpf_budgets`
    enables eBPF programs that limit memory which the kernel charges to no control group."""

    root: Path = Path("/var/lib/insula")
    run: Path = Path("/run/insula")
    prefix: str = "insula"
    socket: Path = Path("/run/insula/insulad.sock")
    users_socket: Path = Path("/run/insula/users.sock")
    spares: int = 2
    log_level: Literal["error", "warning", "info", "debug"] = "info"
    fabric: Literal["linux"] = "linux"
    ebpf_budgets: bool = True
    network: NetworkSettings = NetworkSettings()
    audit: AuditSettings = AuditSettings()
    api: ApiSettings = ApiSettings()
    quotas: QuotaSettings = QuotaSettings()
    storage: StorageSettings = StorageSettings()
    machines: MachineSettings = MachineSettings()
    oidc: list[OidcSettings] = []

    @property
    def state(self) -> Path:
        return self.root / "state.db"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def instances(self) -> Path:
        return self.root / "instances"

    def make(self) -> None:
        """Make the directories, for root only, because files of tenants are below them. The run directory can be
        entered, because a group may use the socket in it; private files in it have modes of their own."""
        for path in (self.root, self.instances):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
        self.run.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.run.chmod(0o711)


class Documented(msgspec.Struct, frozen=True):
    """The documentation of a setting: its key in the file, its values, and its meaning."""

    key: str
    takes: str
    text: str


DOCUMENTED = (
    Documented("root", "absolute path", "Directory for persistent data: store, images, files of instances."),
    Documented("run", "absolute path", "Directory for data that must not survive a reboot. On a tmpfs."),
    Documented("socket", "absolute path", "Unix socket that serves the API. Default: insulad.sock in `run`."),
    Documented(
        "users_socket",
        "absolute path",
        "Unix socket for users of this host that are neither root nor in the group insula. Default: users.sock in "
        "`run`.",
    ),
    Documented(
        "prefix",
        "1 to 8 of a-z and 0-9, a letter first",
        "Prefix of the names of network namespaces, nftables tables and control groups. Change it only after "
        "`insula down`.",
    ),
    Documented("spares", "0 to 32", "Warm containers for each tenant with recent launches."),
    Documented(
        "log_level", "error, warning, info, debug", "Lowest severity of messages that are logged. debug logs requests."
    ),
    Documented("fabric", "linux", "The implementation of tenants' networks: linux needs only the kernel."),
    Documented(
        "ebpf_budgets",
        "true, false",
        "Whether eBPF programs attached to kernel functions limit each tenant's sockets, file locks and terminals, "
        "which Linux counts for no control group. false removes them, and then there is no limit for these.",
    ),
    Documented(
        "network.range4",
        "IPv4 network",
        "Addresses of tenants' uplinks on this host, two a tenant. No tenant's network may overlap it. Change it only "
        "after `insula down`, as when the host's own network or a VPN uses the default.",
    ),
    Documented("network.range6", "IPv6 network", "The same for IPv6."),
    Documented(
        "network.resolvers",
        "list of at most 8 IP addresses",
        "Upstream name servers of tenants' resolvers. Absent: those of the host's resolv.conf(5). []: none, so that "
        "only names of instances resolve.",
    ),
    Documented(
        "network.link",
        "auto, or a rate as in 10gbit",
        "Bandwidth between this host and the outside in each direction, of which 95 % can be promised to tenants. "
        "auto: the speed that the device of the default route reports.",
    ),
    Documented(
        "network.floating",
        "list of at most 64 IP networks",
        "The pool of external addresses that tenants get as floating ones. They are routed to this host, or are free "
        "in one of its own networks. []: none.",
    ),
    Documented(
        "network.verify",
        "off, or a duration from 1s, as in 1m",
        "How often the isolation of all tenants is proven from what the kernel has installed. Beside this, a tenant is "
        "proven when another program changes something in its namespace. What is found is a problem of "
        "`insula status`, an event and a metric.",
    ),
    Documented(
        "network.repair",
        "true, false",
        "Whether what such a proof finds is installed again at once. Else it is within a minute, as all networks are.",
    ),
    Documented(
        "audit.path",
        "absolute path",
        "The audit log: one JSON object a line for each request that changes something, or reads an instance's data.",
    ),
    Documented(
        "audit.size",
        "size from 64k, or 0",
        "Size at which the audit log is renamed to audit.log.1 and a new one started. 0 leaves that to logrotate(8).",
    ),
    Documented(
        "api.listen",
        "list of at most 16 ADDRESS:PORT",
        "Addresses at which the API is served by HTTPS, as in 0.0.0.0:7443 or [::]:7443. []: none.",
    ),
    Documented(
        "api.names",
        "list of at most 64 names and addresses",
        "Further names and addresses by which clients reach this host, for the server's certificate.",
    ),
    Documented(
        "api.user",
        "user name or ID",
        "The user that the process runs as in which TLS ends. Nothing else may run as it.",
    ),
    Documented("audit.files", "0 to 1000", "Renamed audit logs that are kept. Older ones are removed."),
    Documented(
        "audit.witness",
        "absolute path, or empty",
        "A file on another disk, to which number and hash of the audit log's last line are appended once a minute and "
        "at each rotation, for `insula audit --verify --witness`.",
    ),
    *(
        Documented(f"quotas.{quota.name}", takes(quota), f"The limit of new tenants: {quota.text}.")
        for quota in quotas.TABLE
    ),
    *(Documented(f"quotas.{quota.name}", takes(quota), quota.text) for quota in USERS),
    Documented(
        "storage.pool",
        "size from 16m (xfs: 300m), or 0",
        "Size of the pool: a file system in the file pool.img in `root`, with quotas, for the writable layers of new "
        "instances. Its blocks are allocated when it is made. A larger size makes it grow. 0: none is made.",
    ),
    Documented("storage.format", "ext4, xfs", "The format of a new pool."),
    Documented(
        "storage.disk",
        "size from 1m",
        "Limit of the disk of an instance that is created without one, if its tenant has such a limit.",
    ),
    Documented(
        "storage.reserve",
        "size, or 0",
        "Instances are created only while so much is free on their file system, or a twentieth of it, whichever is "
        "less.",
    ),
    Documented(
        "machines.hypervisor",
        "qemu, xen:///system, esx://USER@HOST/",
        "The hypervisor of virtual machines. On domain 0 of Xen `insula run --vm` makes guests of it. With ESXi it is "
        "refused, and `insula doctor` tries the connection.",
    ),
    Documented(
        "machines.template",
        "128m, 256m, 512m, 1g, 2g, 4g, 8g, or 0",
        "Memory of virtual machines whose template is made in the background, so that the first of them starts as fast "
        "as others, on a host that has what they need. It takes some 100 MiB. 0: none is made in advance.",
    ),
    Documented("machines.migration", "list of addresses and CIDRs", "Hosts that machines may move to."),
    Documented("machines.password_file", "absolute path, or empty", "A file with the password of the user of ESXi."),
    *(Documented(f"oidc.{name}", value, text) for name, value, text in DESCRIPTIONS),
)


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Load the settings from the file `path`, overridden by variables of `environ`.

    None is the file that INSULA_CONFIG names, else /etc/insula/insulad.toml if that exists. `Invalid`.
    """
    named = path or (Path(environ["INSULA_CONFIG"]) if environ.get("INSULA_CONFIG") else None)
    data = _read(named or FILE, required=named is not None)
    settings = _checked(data, str(named or FILE), {})
    over: dict[str, Any] = {key: environ[name] for name, key in ENVIRONMENT.items() if environ.get(name)}
    if not over:
        return settings
    spares = str(over.get("spares", "0"))
    if not (spares.isascii() and spares.isdigit() and len(spares) < 9):
        raise Invalid(f"INSULA_SPARES {shorten(spares)} is not a number from 0 to 32", "leave it out for 2")
    if "spares" in over:
        over["spares"] = int(spares)
    return _checked({**data, **over}, "", {key: name for name, key in ENVIRONMENT.items()})


def default_of(key: str) -> object:
    """Return the default value of a setting of `DOCUMENTED`; true and false as in TOML."""
    value: object = OidcSettings() if key.startswith("oidc.") else Settings()
    for part in key.removeprefix("oidc.").split("."):
        value = getattr(value, part)
    return str(value).lower() if isinstance(value, bool) else value


def _read(path: Path, *, required: bool) -> dict[str, Any]:
    """Read the tables of a TOML file; empty if it is missing and not required."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO without a writer must not block
        try:
            _check_file(path, os.fstat(fd))
            with open(fd, "rb", closefd=False) as file:
                content = file.read(_MAX_FILE + 1)
        finally:
            os.close(fd)
        if len(content) > _MAX_FILE:
            raise Invalid(f"{path}: it is larger than {_MAX_FILE} bytes", _MANUAL)
        return tomllib.loads(content.decode())
    except FileNotFoundError:
        if not required:
            return {}
        raise Invalid(f"{path}: there is no such file", "name one that exists, or leave it out") from None
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror or error}", "see ls -l of the path") from None
    except UnicodeDecodeError:
        raise Invalid(f"{path}: it is not UTF-8", _MANUAL) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Invalid(f"{path}: it is not TOML: {shorten(str(error), 120)}", _MANUAL) from None


def _check_file(path: Path, found: os.stat_result) -> None:
    """Check that it is a regular file which only root and the reader may change. `Invalid`."""
    if not stat.S_ISREG(found.st_mode):
        raise Invalid(f"{path}: it is no regular file", _MANUAL)
    if found.st_uid not in (0, os.geteuid()):
        raise Invalid(f"{path}: it belongs to user {found.st_uid}, who could change it", f"chown root {path}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Invalid(f"{path}: others may write to it", f"chmod go-w {path}")


def _checked(data: dict[str, Any], source: str, names: Mapping[str, str]) -> Settings:
    """Convert `data` to a struct. Errors begin with `source`, and have a key's name in `names`."""
    try:
        unknown = _unknown(data, Settings, "")
        if unknown:
            raise Invalid(f"there is no setting {shorten(unknown)}", _nearest(unknown))
        try:
            settings = msgspec.convert(data, Settings, dec_hook=_path)
        except msgspec.ValidationError as error:
            raise _explained(str(error), names) from None
        if "socket" not in data:
            settings = msgspec.structs.replace(settings, socket=settings.run / "insulad.sock")
        if "users_socket" not in data:
            settings = msgspec.structs.replace(settings, users_socket=settings.run / "users.sock")
        _check(settings, names)
    except Invalid as error:
        if source:
            raise Invalid(f"{source}: {error.message}", error.hint) from None
        raise
    return settings


def _path(kind: type, value: object) -> object:
    """Convert to a path, which msgspec can't decode."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError("Expected `str`")


def _unknown(data: Mapping[str, Any], kind: type, above: str) -> str | None:
    """Return the full name of the first key that `kind` has no field for."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in data.items():
        if key not in fields:
            return f"{above}{key}"
        if isinstance(value, dict) and fields[key] in (
            NetworkSettings,
            AuditSettings,
            ApiSettings,
            QuotaSettings,
            StorageSettings,
            MachineSettings,
        ):
            found = _unknown(value, fields[key], f"{above}{key}.")
            if found:
                return found
        if key == "oidc" and not above and isinstance(value, list):
            for each in value:
                if isinstance(each, dict) and (found := _unknown(each, OidcSettings, "oidc.")):
                    return found
    return None


def _nearest(key: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key, [setting.key for setting in DOCUMENTED], 1)
    return f"did you mean {near[0]}? {_MANUAL}" if near else _MANUAL


def _explained(text: str, names: Mapping[str, str]) -> Invalid:
    """Convert msgspec's message about a value of the wrong type, so that it begins with the key."""
    match = _EXPECTED.fullmatch(text)
    where = (match["where"] or "") if match else ""
    what = match["what"] if match else text
    return Invalid(f"{names.get(where, where) or 'the file'}: {what[0].lower()}{what[1:]}", _MANUAL)


def _check(settings: Settings, names: Mapping[str, str]) -> None:
    """Check values beyond their types. `Invalid`."""

    def wrong(key: str, value: object, what: str, hint: str) -> Invalid:
        return Invalid(f"{names.get(key, key)} {shorten(str(value))} {what}", hint)

    audit, network = settings.audit, settings.network
    paths = {
        "root": settings.root,
        "run": settings.run,
        "socket": settings.socket,
        "users_socket": settings.users_socket,
        "audit.path": Path(audit.path),
    }
    for key, path in paths.items():
        if not path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise wrong(key, path, "is not absolute", "write the whole path")
    if not _PREFIX.fullmatch(settings.prefix):
        raise wrong("prefix", settings.prefix, "is no prefix", "use 1 to 8 of a-z and 0-9, a letter first")
    if not 0 <= settings.spares <= _MAX_SPARES:
        raise wrong("spares", settings.spares, f"is not a number from 0 to {_MAX_SPARES}", "leave it out for 2")
    check_network(network, wrong)
    _check_api(settings.api, wrong)
    for quota in (*quotas.TABLE, *USERS):
        limit(settings.quotas, quota)
    check_providers(settings.oidc, wrong)
    try:
        size = audit.size_bytes
    except Invalid as error:
        raise wrong("audit.size", audit.size, "is no size", error.hint or _MANUAL) from None
    if 0 < size < _LEAST_AUDIT:
        raise wrong("audit.size", audit.size, "is too small", "64k at least, or 0")
    _check_storage(settings.storage, wrong)
    check_machines(settings.machines, wrong)
    if audit.witness and not Path(audit.witness).is_absolute():
        raise wrong("audit.witness", audit.witness, "is not absolute", "write the whole path")
    if not 0 <= audit.files <= _MAX_AUDIT_FILES:
        raise wrong("audit.files", audit.files, f"is not a number from 0 to {_MAX_AUDIT_FILES}", "leave it out for 9")


def _check_storage(storage: StorageSettings, wrong: Any) -> None:
    least = {"pool": _LEAST_POOL[storage.format], "disk": _LEAST_DISK, "reserve": 0}
    for key, minimum in least.items():
        text = getattr(storage, key)
        try:
            size = parse_size(text)
        except Invalid as error:
            raise wrong(f"storage.{key}", text, "is no size", error.hint or _MANUAL) from None
        if size < minimum and (size or key != "pool"):
            raise wrong(f"storage.{key}", text, "is too small", f"{minimum >> 20}m at least")


def _check_api(api: ApiSettings, wrong: Any) -> None:
    if len(api.listen) > _MAX_LISTEN:
        raise wrong("api.listen", api.listen, "are too many", f"name at most {_MAX_LISTEN}")
    for text in api.listen:
        try:
            split_address(text)
        except ValueError:
            raise wrong("api.listen", text, "is not ADDRESS:PORT", "as in 0.0.0.0:7443 or [::]:7443") from None
    if len(api.names) > _MAX_NAMES:
        raise wrong("api.names", api.names, "are too many", f"name at most {_MAX_NAMES}")
    for name in api.names:
        if not _HOST.fullmatch(name):
            raise wrong("api.names", name, "is no name or address", "as in cloud.example.com or 192.0.2.7")
    if not _USER.fullmatch(api.user) or api.user in ("0", "root"):
        raise wrong("api.user", api.user, "is no user without rights", "leave it out for insula-gate")


def split_address(text: str) -> tuple[str, int]:
    """Split ``192.0.2.7:7443`` or ``[2001:db8::7]:7443`` into address and port. ValueError."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    address = ip_address(bare)
    if (address.version == 6) != (bare != host) or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(text)
    return str(address), int(port)
