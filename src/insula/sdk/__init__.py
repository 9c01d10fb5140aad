"""The Python SDK: the HTTP API as typed methods, for threads (`Insula`) and for asyncio (`AsyncInsula`).

    >>> from insula.sdk import Insula, InstanceSpec
    >>> with Insula() as cloud:
    ...     cloud.tenants.create("acme", cpus=2)
    ...     cloud.networks.create("acme", "default", "10.0.0.0/24")
    ...     cloud.instances.run("acme", InstanceSpec(image="busybox", name="web", command=["sleep", "600"]))
    ...     for view in cloud.instances.list("acme"):
    ...         print(view.instance.name, view.status.state)

Answers and requests are the structs of `insula.model`. Errors are those of the command line:

    InsulaError                   a message, and a hint what to do about it
    ├── Invalid                   the request is wrong; nothing was changed
    ├── Unauthenticated           the proof of who you are is not valid, or no longer
    ├── Denied                    you may not do this
    ├── NotFound                  there is no such object, or you may not know of it
    ├── Conflict                  the name, address or state is taken
    ├── QuotaExceeded             a limit of the tenant forbids it
    ├── IdempotencyKeyReused      the key belongs to another request
    ├── TooManyRequests           `retry_after` says when the next may come
    ├── Failed                    Insula tried and failed, and has undone its work
    └── Unavailable               no server answers, or it lacks a requirement
        └── ConnectionLost        the connection ended before the answer

A *transport* says how the server is reached: `UnixTransport`, `HTTPSTransport`, `ASGITransport` (an application in this
process), or any object with the methods of `Transport`.
"""

from insula.model.declared import ApplySpec, DeclaredFile, DeclaredItem
from insula.model.errors import (
    Conflict,
    Denied,
    Failed,
    IdempotencyKeyReused,
    InsulaError,
    Invalid,
    NotFound,
    QuotaExceeded,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)
from insula.model.objects import (
    ConsoleSize,
    ContainerOptions,
    Exit,
    Healthcheck,
    HostEntry,
    Image,
    InstanceSpec,
    MachineOptions,
    NetworkAttachment,
    Resources,
    RestartPolicy,
    Rlimit,
    TmpfsMount,
)
from insula.model.views import Credentials
from insula.sdk._async.client import AsyncInsula
from insula.sdk._async.http import AsyncHTTPSTransport, AsyncUnixTransport
from insula.sdk._async.items import AsyncItems
from insula.sdk._async.process import AsyncAttachedProcess
from insula.sdk._async.transport import AsyncExchange, AsyncTransport
from insula.sdk._sync.client import Insula
from insula.sdk._sync.http import HTTPSTransport, UnixTransport
from insula.sdk._sync.items import Items
from insula.sdk._sync.process import AttachedProcess
from insula.sdk._sync.transport import Exchange, Transport
from insula.sdk.asgi import ASGITransport
from insula.sdk.messages import ConnectionLost, HTTPHead, HTTPRequest
from insula.sdk.types import (
    AnyExplanation,
    AnyInstance,
    AnyNetwork,
    AnyProcess,
    AnyTenant,
    AuditEntry,
    CompletedProcess,
    EventView,
    GuaranteeOptions,
    ImageProgress,
    LimitOptions,
    LogOutput,
    ProcessExit,
    ProcessOutput,
    ResourceOptions,
)

__all__ = [
    "ASGITransport",
    "AnyExplanation",
    "AnyInstance",
    "AnyNetwork",
    "AnyProcess",
    "AnyTenant",
    "ApplySpec",
    "AsyncAttachedProcess",
    "AsyncExchange",
    "AsyncHTTPSTransport",
    "AsyncInsula",
    "AsyncItems",
    "AsyncTransport",
    "AsyncUnixTransport",
    "AttachedProcess",
    "AuditEntry",
    "CompletedProcess",
    "Conflict",
    "ConnectionLost",
    "ConsoleSize",
    "ContainerOptions",
    "Credentials",
    "DeclaredFile",
    "DeclaredItem",
    "Denied",
    "EventView",
    "Exchange",
    "Exit",
    "Failed",
    "GuaranteeOptions",
    "HTTPHead",
    "HTTPRequest",
    "HTTPSTransport",
    "Healthcheck",
    "HostEntry",
    "IdempotencyKeyReused",
    "Image",
    "ImageProgress",
    "InstanceSpec",
    "Insula",
    "InsulaError",
    "Invalid",
    "Items",
    "LimitOptions",
    "LogOutput",
    "MachineOptions",
    "NetworkAttachment",
    "NotFound",
    "ProcessExit",
    "ProcessOutput",
    "QuotaExceeded",
    "ResourceOptions",
    "Resources",
    "RestartPolicy",
    "Rlimit",
    "TmpfsMount",
    "TooManyRequests",
    "Transport",
    "Unauthenticated",
    "Unavailable",
    "UnixTransport",
]
