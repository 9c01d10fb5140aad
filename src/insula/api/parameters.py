"""The parameters of handlers, with their rules for the published schema (model/rules.py)."""

from __future__ import annotations

from typing import Annotated, Any

from litestar import Request
from litestar.di import NamedDependency
from litestar.params import FromQuery, PathParameter, QueryParameter

from insula.control.identities.authority import Authority
from insula.control.plane import ControlPlane
from insula.model import rules
from insula.model.rules import anchored

AnyRequest = Request[Any, Any, Any]
Plane = NamedDependency[ControlPlane]
Sender = NamedDependency[Authority]
"""The rights of the request's sender."""


def _rule(pattern: str, longest: int, example: str) -> dict[str, Any]:
    return {"pattern": anchored(pattern), "max_length": longest, "examples": [example]}


_LABEL = _rule(rules.LABEL, rules.MAX_LABEL, "web")
_IMAGE = _rule(rules.REFERENCE, rules.MAX_REPOSITORY, "busybox:latest")
_DIRECTORY = _rule(rules.ABSOLUTE, rules.MAX_PATH, "/etc/hosts")

TenantName = Annotated[str, PathParameter(schema_extra=_rule(rules.LABEL, rules.MAX_LABEL, "acme"))]
Name = Annotated[str, PathParameter(schema_extra=_LABEL)]
ImageName = Annotated[str, PathParameter(schema_extra=_IMAGE)]
TokenId = Annotated[str, PathParameter(schema_extra=_rule(rules.TOKEN_ID, 16, "0123456789abcdef"))]
Serial = Annotated[str, PathParameter(schema_extra=_rule(rules.SERIAL, 40, "1f2e3d"))]
Pid = Annotated[int, PathParameter(ge=1, le=rules.MAX_PIDS)]
Uid = Annotated[
    int | None,
    QueryParameter(ge=0, lt=1 << 32, schema_extra={"minimum": 0}, description="only requests of this user of the host"),
]
Flag = FromQuery[bool]
NewName = Annotated[str, QueryParameter(schema_extra=_LABEL)]
NewImage = Annotated[str, QueryParameter(schema_extra=_IMAGE)]
OptionalImage = Annotated[str | None, QueryParameter(schema_extra=_IMAGE, description="of the one image")]
OptionalTenant = Annotated[str | None, QueryParameter(schema_extra=_LABEL, description="only of this tenant")]
Bound = Annotated[
    str, QueryParameter(schema_extra=_rule(rules.BOUND, rules.MAX_BOUND, "ann"), description="a principal")
]
TraceEndName = Annotated[
    str,
    QueryParameter(
        schema_extra=_rule(rules.TRACE_END, rules.MAX_TRACE_END, "web"),
        description="an instance, instance:interface, an IP address, or outside",
    ),
]
TraceService = Annotated[
    str, QueryParameter(schema_extra=_rule(rules.TRACE_SERVICE, 9, "tcp/80"), description="tcp/PORT, udp/PORT or icmp")
]
SignalName = Annotated[str, QueryParameter(schema_extra=_rule(rules.SIGNAL, 12, "SIGTERM"), description="signal(7)")]
Revision = Annotated[int | None, QueryParameter(ge=0, schema_extra={"minimum": 0, "maximum": rules.MAX_BYTES})]
Since = Annotated[
    float | None,
    QueryParameter(ge=0, le=rules.MAX_TIME, schema_extra={"minimum": 0}, description="seconds since the epoch"),
]
Tail = Annotated[
    int | None,
    QueryParameter(ge=0, schema_extra={"minimum": 0, "maximum": rules.MAX_BYTES}, description="only the last lines"),
]
Timeout = Annotated[
    float | None, QueryParameter(ge=0, le=86400, schema_extra={"minimum": 0}, description="seconds before SIGKILL")
]
Names = Annotated[
    list[str] | None,
    QueryParameter(
        name="name",
        schema_extra={
            "items": {"type": "string", "pattern": anchored(rules.LABEL), "maxLength": rules.MAX_LABEL},
            "max_items": 1000,
        },
        description="only these instances; default: all running ones",
    ),
]
Cells = Annotated[
    int | None,
    QueryParameter(ge=0, le=65535, schema_extra={"minimum": 0}, description="of the client's terminal, in characters"),
]
Interval = Annotated[
    float | None, QueryParameter(ge=0.1, le=3600, description="seconds between samples; default: one sample")
]
Inside = Annotated[
    str,
    QueryParameter(max_length=4096, schema_extra=_DIRECTORY, description="an absolute path inside the instance"),
]
HowToCopy = Annotated[
    str | None,
    QueryParameter(
        schema_extra={"enum": ["tree", "content"]},
        description="as cp(1): `tree` puts the one tree of the archive into `path` if that is a directory, else there "
        "as `path`; `content` puts what is in it into the directory `path`",
    ),
]
