"""Types of fields with their rules, for the published schema (OpenAPI).

The schema has the rules of `rules.py`. They are not checked while a body is decoded: the checks of the server use the
same rules, and have an error with a hint for each.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from insula.model import rules
from insula.model.quotas import Quota
from insula.model.rules import anchored

T = TypeVar("T")


def schema(**members: Any) -> msgspec.Meta:
    """Return an annotation with these members of JSON Schema."""
    return msgspec.Meta(extra_json_schema=members)


def _text(pattern: str, longest: int, *examples: str, **members: Any) -> msgspec.Meta:
    return schema(pattern=anchored(pattern), maxLength=longest, examples=list(examples), **members)


def _number(least: float, most: float, **members: Any) -> msgspec.Meta:
    return schema(minimum=least, maximum=most, **members)


def at_most(items: int, least: int = 0) -> msgspec.Meta:
    """Return the annotation of a list with at most so many items."""
    return schema(minItems=least, maxItems=items) if least else schema(maxItems=items)


def limit(quota: Quota) -> Any:
    """Return the type of a limit of a tenant."""
    return Annotated[int if quota.whole else float, _number(quota.least, quota.most)]


Label = Annotated[str, _text(rules.LABEL, rules.MAX_LABEL, "web")]
OptionalLabel = Annotated[str, _text(f"({rules.LABEL})?", rules.MAX_LABEL, "web")]
PrincipalName = Annotated[str, _text(rules.PRINCIPAL, 2 * rules.MAX_LABEL + 1, "ann", "acme/ci")]
BoundName = Annotated[str, _text(rules.BOUND, rules.MAX_BOUND, "ann", "acme/ci", "oidc:developers")]
Subject = Annotated[str, _text(rules.SUBJECT, rules.MAX_SUBJECT, "248289761001")]
ImageReference = Annotated[str, _text(rules.REFERENCE, rules.MAX_REPOSITORY, "busybox:latest")]
LabelName = Annotated[str, _text(rules.LABEL_NAME, 128, "team")]
LabelValue = Annotated[str, schema(maxLength=rules.MAX_LABEL_VALUE)]
Labels = Annotated[dict[LabelName, LabelValue], schema(maxProperties=rules.MAX_LABELS)]
IpAddress = Annotated[
    str, schema(maxLength=rules.MAX_ADDRESS, description="an IPv4 or IPv6 address", examples=["10.0.0.53"])
]
Address4 = Annotated[str, schema(format="ipv4", maxLength=15, examples=["10.0.0.2"])]
Address6 = Annotated[str, schema(format="ipv6", maxLength=rules.MAX_ADDRESS, examples=["fd00::2"])]
AddressRange = Annotated[
    str,
    schema(
        maxLength=rules.MAX_SUBNET,
        description="an IPv4 or IPv6 address, or a range in CIDR notation",
        examples=["10.0.0.100", "10.9.0.0/16"],
    ),
]
Subnet4 = Annotated[
    str,
    schema(
        format="ipv4-network",
        maxLength=rules.MAX_SUBNET,
        description="CIDR notation without host bits: a prefix of 8 to 30 bits",
        examples=["10.0.0.0/24"],
    ),
]
Subnet6 = Annotated[
    str,
    schema(
        format="ipv6-network",
        maxLength=rules.MAX_SUBNET,
        description="CIDR notation without host bits: a prefix of 16 to 126 bits",
        examples=["fd00:1::/64"],
    ),
]
Cidr = Annotated[
    str,
    schema(
        maxLength=rules.MAX_SUBNET,
        description="an IPv4 or IPv6 range in CIDR notation without host bits, or one address",
        examples=["10.0.0.0/8", "fd00::/8"],
    ),
]
NamePattern = Annotated[str, _text(rules.NAME_PATTERN, rules.MAX_DOMAIN, "api.example.com", "*.example.com")]
PortNumber = Annotated[int, _number(1, rules.MAX_PORT)]
TransportProtocol = Literal["tcp", "udp"]
IcmpType = Annotated[int, _number(0, 255)]
Priority = Annotated[int, _number(0, rules.MAX_PRIORITY)]
Mac = Annotated[str, _text(rules.PORT_MAC, 17, "02:42:ac:11:00:02")]
Mtu = Annotated[int, _number(rules.MIN_MTU, rules.MAX_MTU, description="bytes; at least 1280 with IPv6")]
Cpus = Annotated[float, _number(rules.MIN_CPUS, rules.MAX_CPUS)]
Bandwidth = Annotated[int, _number(rules.MIN_BANDWIDTH, rules.MAX_BANDWIDTH)]
PacketRate = Annotated[int, _number(rules.MIN_PACKETS, rules.MAX_PACKETS)]
Memory = Annotated[int, _number(rules.MIN_MEMORY, rules.MAX_BYTES)]
Disk = Annotated[int, _number(rules.MIN_DISK, rules.MAX_BYTES, description="bytes")]
Inodes = Annotated[int, _number(rules.MIN_INODES, rules.MAX_INODES, description="files and directories")]
Pids = Annotated[int, _number(1, rules.MAX_PIDS)]
ArgumentText = Annotated[
    str, schema(pattern=anchored(rules.WITHOUT_NUL), description="at most 128 KiB (execve(2))", examples=["httpd"])
]
Environment = dict[Annotated[str, schema(pattern=anchored(rules.VARIABLE), examples=["HOME"])], ArgumentText]
WorkingDirectory = Annotated[str, _text(f"({rules.ABSOLUTE})?", rules.MAX_PATH, "/srv")]
UserName = Annotated[str, _text(f"({rules.USER}(:{rules.USER})?)?", 511, "www-data", "1000:1000")]
GroupName = Annotated[str, _text(rules.USER, 255, "audio")]
Hostname = Annotated[str, _text(rules.HOSTNAME, rules.MAX_HOSTNAME, "web.example.com")]
Domain = Annotated[str, _text(rf"{rules.DOMAIN}", rules.MAX_DOMAIN, "example.com")]
SearchDomain = Annotated[str, _text(rf"{rules.DOMAIN}|\.", rules.MAX_DOMAIN, "example.com")]
HostAddress = Annotated[str, schema(maxLength=300, examples=["192.0.2.7:7443"])]
AuthorityPem = Annotated[str, schema(maxLength=1 << 16, description="PEM")]
TicketSecret = Annotated[str, schema(maxLength=128)]
Signal = Annotated[str, _text(rules.SIGNAL, 12, "SIGTERM")]
StopTimeout = Annotated[float, _number(0, rules.MAX_STOP_TIMEOUT)]
TMPFS_PATH = r"(?!/(?:proc|sys|dev)(?:/|$))(?:/(?!\.{1,2}(?:/|$))[^/\x00]+)+"
TmpfsPath = Annotated[str, _text(TMPFS_PATH, rules.MAX_PATH, "/run")]
Bytes = Annotated[int, _number(rules.MIN_TMPFS, rules.MAX_BYTES)]
TmpfsMode = Annotated[int, _number(0, rules.MAX_TMPFS_MODE)]
Id = Annotated[int, _number(0, rules.IDS - 1)]
RlimitName = Annotated[str, schema(enum=list(rules.RLIMITS))]
RlimitValue = Annotated[int, _number(-1, rules.MAX_BYTES, description="-1 is no limit")]
Capability = Annotated[
    str, schema(enum=["ALL", *rules.CAPABILITIES], description="the server takes CAP_ and lower case, too")
]
Sysctls = dict[
    Annotated[str, _text(rules.SYSCTL, 255, "net.core.somaxconn")],
    Annotated[str, _text(rules.SYSCTL_VALUE, 1024, "128")],
]
SocketFamily = Annotated[str, schema(enum=list(rules.SOCKET_FAMILIES))]
LogSize = Annotated[int, _number(rules.MIN_LOG, rules.MAX_LOG)]
LogFiles = Annotated[int, _number(1, rules.MAX_LOG_FILES)]
CheckSeconds = Annotated[float, _number(rules.MIN_CHECK, rules.MAX_CHECK)]
CheckStart = Annotated[float, _number(0, rules.MAX_CHECK)]
CheckRetries = Annotated[int, _number(1, rules.MAX_CHECK_RETRIES)]
Restarts = Annotated[int, _number(0, rules.MAX_RESTARTS)]
GroupNames = Annotated[list[GroupName], at_most(rules.MAX_GROUPS)]
NameServers = Annotated[list[IpAddress], at_most(rules.MAX_NAME_SERVERS)]
SearchDomains = Annotated[list[SearchDomain], at_most(rules.MAX_SEARCH_DOMAINS)]
ArgumentVector = Annotated[list[ArgumentText], at_most(65536, least=1)]
UserData = Annotated[str, schema(maxLength=rules.MAX_USER_DATA, examples=["#cloud-config\n{}\n"])]
SshKeys = Annotated[
    list[Annotated[str, _text(rules.SSH_KEY, rules.MAX_SSH_KEY, "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 ann@example")]],
    at_most(rules.MAX_SSH_KEYS),
]
Release = Annotated[str, _text(rules.RELEASE, 32, "bookworm")]
