"""The types of the SDK beside those of `insula.model`: items of streams, and what has two forms."""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec

from insula.model.objects import Image, Struct
from insula.model.own_views import OwnExplanation, OwnInstanceView, OwnNetworkView, OwnProcess, OwnTenantView
from insula.model.stream import Kind
from insula.model.views import Explanation, InstanceView, NetworkView, ProcessView, TenantView

AnyTenant = TenantView | OwnTenantView
"""A tenant: `TenantView` for those who see the host, else `OwnTenantView`, which has fewer fields. So are the rest."""
AnyNetwork = NetworkView | OwnNetworkView
AnyInstance = InstanceView | OwnInstanceView
AnyProcess = ProcessView | OwnProcess
AnyExplanation = Explanation | OwnExplanation
StreamName = Literal["stdout", "stderr"]
STREAMS: dict[Kind, StreamName] = {Kind.STDOUT: "stdout", Kind.STDERR: "stderr"}
InstanceState = Literal["created", "starting", "running", "paused", "stopping", "exited", "failed"]


class LimitOptions(TypedDict, total=False):
    """Limits of a tenant, one for each quota of `insula.model.quotas`. None is no limit, absent is the default, or the
    limit of now."""

    cpus: float | None
    memory: int | None  # bytes
    pids: int | None
    bandwidth: int | None  # bit/s
    disk: int | None  # bytes
    inodes: int | None
    instances: int | None
    networks: int | None
    ports: int | None
    routers: int | None
    policies: int | None
    address_groups: int | None
    published_ports: int | None
    floating_ips: int | None
    load_balancers: int | None
    images: int | None
    image_bytes: int | None
    config_bytes: int | None
    spec_bytes: int | None
    log_bytes: int | None
    service_accounts: int | None
    tokens: int | None
    exec_sessions: int | None
    streams: int | None
    upload_bytes: int | None
    requests: int | None  # a second


class ResourceOptions(TypedDict, total=False):
    """Limits of an instance. None is no limit except the tenant's, absent is the limit of now."""

    cpus: float | None
    memory: int | None  # bytes
    pids: int | None
    disk: int | None  # bytes
    inodes: int | None


class GuaranteeOptions(TypedDict, total=False):
    """Floors and ceilings of a tenant or an instance. None is none, absent is that of now."""

    floor_out: int | None  # bit/s
    floor_in: int | None
    ceiling_out: int | None
    ceiling_in: int | None
    packets_out: int | None  # a second, of instances only
    packets_in: int | None
    cpus: float | None
    memory: int | None  # bytes


class EventView(Struct, kw_only=True):
    """A change of an object, or an entry of the audit log (`kind` "request"). Fields that an action does not have are
    None; `details` are further ones. `revision` and `pid` are for those who see the host."""

    time: float
    kind: str
    action: str
    tenant: str | None = None
    name: str | None = None
    cursor: str | None = None  # to resume after this event
    revision: int | None = None
    id: str | None = None
    image: str | None = None
    pid: int | None = None
    restarts: int | None = None
    exit_status: int | None = None
    signal: int | None = None
    oom: bool | None = None
    error: str | None = None
    details: dict[str, object] = {}


class AuditEntry(Struct, kw_only=True):
    """An entry of the audit log: who asked for what, by which proof, with what result. `time` is text of RFC 3339.
    `details` are further fields, which depend on the request."""

    time: str
    id: str | None = None
    seq: int | None = None
    user: str | None = None
    proof: str | None = None
    address: str | None = None
    uid: int | None = None
    verb: str | None = None
    tenant: str | None = None
    name: str | None = None
    status: int | None = None
    error: str | None = None
    ms: float | None = None
    details: dict[str, object] = {}


class ImageProgress(Struct, kw_only=True):
    """A line of progress of a pull, a push or a build; at last the `image`."""

    progress: str | None = None
    image: Image | None = None


class LogOutput(Struct, kw_only=True):
    """A piece of an instance's output, with the time at which it was written."""

    time: float
    stream: StreamName
    data: bytes


class ProcessOutput(Struct, kw_only=True):
    """A piece of a process's output. That of a terminal is all "stdout"."""

    stream: StreamName
    data: bytes


class ProcessExit(Struct, kw_only=True):
    """The end of a process: `exit_status` as in a shell (128 + signal if it was killed); None if it is unknown."""

    exit_status: int | None
    signal: int | None = None
    oom: bool = False


class CompletedProcess(msgspec.Struct, frozen=True, kw_only=True):
    """All that a process has written, and its end."""

    exit: ProcessExit
    stdout: bytes
    stderr: bytes
