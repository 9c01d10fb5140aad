"""The rules for values in requests: patterns, lengths and bounds.

Each is defined here once. The checks of the server use it, and so does the published schema (`fields.py`), so that
what the schema allows is what the server takes. Patterns are for `re.fullmatch`, and use only what regular expressions
of ECMA-262 have as well. Nothing is imported, because the command line uses this too.
"""

from __future__ import annotations

# -- names -----------------------------------------------------------------------------------------------------------

LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
"""A DNS label (RFC 1123): tenants, networks, instances, users."""
MAX_LABEL = 63
DISK = "[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?"
MAX_DISK_NAME = 20
"""Characters of the name of a disk: a virtio disk has so many for its serial number."""
MAX_DISKS = 8
MIN_MACHINE_DISK = 16 << 20
PRINCIPAL = f"({LABEL}/)?{LABEL}"
"""A user, or TENANT/NAME of a service account."""
PROVIDER = "[a-z][a-z0-9-]{0,15}"
"""The name of a provider of OpenID Connect in the settings."""
GROUP = rf"{PROVIDER}:[^\x00-\x1f\x7f]{{1,256}}"
"""PROVIDER:GROUP, a group of a provider of OpenID Connect."""
BOUND = f"(?:{PRINCIPAL}|{GROUP})"
MAX_BOUND = 273
SUBJECT = "[ -~]{1,255}"
"""The identifier of a user at a provider (OpenID Connect Core, 2: at most 255 ASCII characters)."""
MAX_SUBJECT = 255
_PART = "[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?"
DOMAIN = rf"{_PART}(\.{_PART})*\.?"
MAX_DOMAIN = 253
_HOST_PART = "[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?"
HOSTNAME = rf"{_HOST_PART}(\.{_HOST_PART})*"
MAX_HOSTNAME = 64  # HOST_NAME_MAX
TOKEN_ID = "[0-9a-f]{16}"
SERIAL = "[0-9a-f]{1,40}"
"""The serial number of a certificate (RFC 5280, 4.1.2.2)."""

# -- labels of objects -----------------------------------------------------------------------------------------------

LABEL_NAME = "[a-zA-Z0-9]([a-zA-Z0-9._/-]{0,126}[a-zA-Z0-9])?"
MAX_LABELS = 64
MAX_LABEL_VALUE = 1024

# -- images (distribution, reference/reference.go) -------------------------------------------------------------------

_REGISTRY_PART = "[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
REGISTRY = rf"(?:{_REGISTRY_PART}(?:\.{_REGISTRY_PART})*|\[[0-9a-fA-F:.]+\])(?::[0-9]{{1,5}})?"
COMPONENT = "[a-z0-9]+(?:(?:\\.|_|__|-+)[a-z0-9]+)*"
TAG = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
DIGEST = "sha256:[0-9a-f]{64}"
MAX_REPOSITORY = 255
_FIRST = (
    rf"{_REGISTRY_PART}(?:\.{_REGISTRY_PART})+(?::[0-9]{{1,5}})?|{_REGISTRY_PART}:[0-9]{{1,5}}|localhost|"
    r"\[[0-9a-f]*:[0-9a-f:]*\](?::[0-9]{1,5})?|[a-z0-9]+(?:(?:_|__|-+)[a-z0-9]+)*"
)
"""The part before the first slash: a registry, which has a dot or a colon, or a part of a repository."""
REFERENCE = rf"(?:(?:{_FIRST})/(?:{COMPONENT}/)*)?{COMPONENT}(?::{TAG})?(?:@{DIGEST})?"
MAX_REFERENCE = MAX_REPOSITORY + 1 + 128 + 1 + 71

RELEASE = "[a-z][a-z0-9.-]{0,31}"
"""The code name of a release of a distribution."""

# -- addresses -------------------------------------------------------------------------------------------------------

MAC = "([0-9a-f]{2}:){5}[0-9a-f]{2}"
PORT_MAC = "(?:[1-9a-f][02468ace]|0[468ace])(?::[0-9a-f]{2}){5}|02:(?:0[4-9a-f]|[1-9a-f][0-9a-f])(?::[0-9a-f]{2}){4}"
"""A MAC address that a port may have: no group address (IEEE 802), and none of those of gateways and uplinks."""
MAX_ADDRESS = 45  # of IPv6, with an IPv4 address at its end
MAX_SUBNET = MAX_ADDRESS + 4
MAX_PORTS = 16  # of an instance
MAX_SNAPSHOTS = 100  # of an instance
MAX_FORKS = 64  # at a time
MAX_VIEWERS = 8  # of a screen
MAX_ADDRESS_PAIRS = 32  # of a port
INTERFACE = "eth(?:0|[1-9][0-9]?)"
"""The name of a port's device inside its instance."""
MAX_ROUTER_NETWORKS = 1000
MAX_ROUTES = 1000  # of a router
MIN_MTU, MIN_MTU6, MAX_MTU = 576, 1280, 9216  # RFC 791: every host accepts 576 bytes; RFC 8200; jumbo frames

# -- policies --------------------------------------------------------------------------------------------------------

NAME_PATTERN = rf"(\*\.)?{DOMAIN}"
"""A DNS name, or ``*.`` and one: any name below it."""
MAX_LABEL_VALUES = 64
MAX_EXPRESSIONS = 16
MAX_EXCEPTIONS = 64
MAX_PEERS = 64
MAX_PORT_MATCHES = 64
MAX_POLICY_RULES = 128
MAX_GROUP_CIDRS = 1000
MAX_PRIORITY = 1_000_000

# -- limits ----------------------------------------------------------------------------------------------------------

MIN_CPUS, MAX_CPUS = 0.01, 65536
MIN_DISK = 1 << 20
MIN_INODES = 16
MAX_INODES = 1 << 32
MIN_MEMORY = 6 << 20  # bytes; with less the kernel kills the process that sets the container up
MACHINE_MEMORY = 256 << 20
"""Bytes of memory of a virtual machine whose spec has no limit."""
MAX_BYTES = (1 << 63) - 1
MAX_PIDS = 1 << 22  # PID_MAX_LIMIT, proc_sys_kernel(5)
MAX_INSTANCES = 1_000_000
MIN_BANDWIDTH = 8000  # bits a second
MAX_BANDWIDTH = 400_000_000_000
MIN_PACKETS, MAX_PACKETS = 10, 100_000_000  # packets a second

# -- processes -------------------------------------------------------------------------------------------------------

MAX_ARGUMENT = 128 << 10  # bytes with its NUL: MAX_ARG_STRLEN, execve(2)
WITHOUT_NUL = "[^\\x00]*"
VARIABLE = "[^=\\x00]+"
ABSOLUTE = "/[^\\x00]*"
MAX_PATH = 4095
USER = "[^\\s:,/\\x00-\\x1f\\x7f]{1,255}"
"""The name or number of a user, or of a group, of an image."""
RLIMITS = (
    "as", "core", "cpu", "data", "fsize", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime",
    "sigpending", "stack",
)  # fmt: skip
CAPABILITIES: tuple[str, ...] = tuple(
    """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
    SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
    AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
    PERFMON BPF CHECKPOINT_RESTORE
    """.split()  # noqa: SIM905
)
"""The names of capabilities(7) without CAP_, in the order of their numbers."""
SYSCTL = r"(net|fs\.mqueue)(\.[a-zA-Z0-9_-]+)+|kernel\.(sem|msg(max|mnb|mni)|shm(all|max|mni|_rmid_forced))"
SYSCTL_VALUE = "[\\x20-\\x7e\\t]{1,1024}"
SIGNAL = (
    "(SIG)?(HUP|INT|QUIT|ILL|TRAP|ABRT|IOT|BUS|FPE|KILL|USR1|SEGV|USR2|PIPE|ALRM|TERM|STKFLT|CHLD|CLD|CONT|STOP|TSTP|"
    "TTIN|TTOU|URG|XCPU|XFSZ|VTALRM|PROF|WINCH|IO|POLL|PWR|SYS|RTMIN|RTMAX)|SIGRTMIN\\+([0-9]|1[0-9]|2[0-9])|"
    "[1-9]|[12][0-9]|3[014-9]|[45][0-9]|6[0-4]"
)
"""A signal in upper case, or a number (signal(7)); the server takes lower case as well."""
SOCKET_FAMILIES = ("can", "kcm", "key", "llc", "packet", "pppox", "rxrpc", "smc", "tipc", "xdp")
IDS = 1 << 16  # user and group IDs of a tenant

# -- files and logs --------------------------------------------------------------------------------------------------

MIN_TMPFS = 4096
MAX_TMPFS_MODE = 0o1777
MAX_MOUNTS = 100
MAX_PORT = 65535
MAX_PUBLISHED = 256
MAX_LISTENERS = 16  # ports, and addresses, of a load balancer
MAX_BACKENDS = 128  # of a load balancer
MIN_LOG, MAX_LOG = 4096, 1 << 40
MAX_LOG_FILES = 1000
MAX_HOSTS = 256
MAX_NAME_SERVERS = 3  # resolv.conf(5)
MAX_SEARCH_DOMAINS = 32
MAX_GROUPS = 64
MAX_USER_DATA = 64 << 10  # characters of what cloud-init is told
SSH_KEY = "[!-~][ -~]*"
"""A line of authorized_keys (sshd(8))."""
MAX_SSH_KEY, MAX_SSH_KEYS = 8192, 64

# -- times -----------------------------------------------------------------------------------------------------------

MAX_TIME = 1e10  # seconds since the epoch, in the year 2286: logs have nanoseconds in 64 bits
MAX_STOP_TIMEOUT = 86_400.0
MIN_CHECK, MAX_CHECK = 1.0, 86_400.0  # seconds between health checks
MAX_CHECK_RETRIES = 1000
CHECK_PATH = "/[\\x21-\\x7e]*"
MAX_CHECK_PATH = 256
MAX_THRESHOLD = 10
MAX_RESTARTS = 1_000_000


def anchored(pattern: str) -> str:
    """Return a pattern that must match the whole text, for JSON Schema, where it may match any part."""
    return f"^(?:{pattern})$"


TRACE_END = f"(?:{LABEL}(?::[a-z0-9]{{1,15}})?|[0-9a-fA-F:.]{{2,45}})"
"""An end of `insula trace`: an instance, one of its interfaces, or an address."""
MAX_TRACE_END = 80
TRACE_SERVICE = "(?:(?:tcp|udp)/[0-9]{1,5}|icmp)"
