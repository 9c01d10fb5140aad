"""The parameters of handlers."""

from __future__ import annotations

from typing import Annotated

from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, PathParameter, QueryParameter

from insula.control.identities.authority import Authority
from insula.control.plane import ControlPlane

Plane = NamedDependency[ControlPlane]
Sender = NamedDependency[Authority]
"""The rights of the request's sender."""
Name = FromPath[str]
Pid = Annotated[int, PathParameter(ge=1, le=1 << 22)]
Uid = Annotated[int | None, QueryParameter(ge=0, lt=1 << 32, description="only requests of this user of the host")]
Flag = FromQuery[bool]
Word = FromQuery[str]
OptionalWord = FromQuery[str | None]
Revision = FromQuery[int | None]
Since = Annotated[float | None, QueryParameter(description="seconds since the epoch")]
Tail = Annotated[int | None, QueryParameter(ge=0, description="only the last lines")]
Timeout = Annotated[float | None, QueryParameter(ge=0, le=86400, description="seconds before SIGKILL")]
Names = Annotated[
    list[str] | None, QueryParameter(name="name", description="only these instances; default: all running ones")
]
Cells = Annotated[int | None, QueryParameter(ge=0, le=65535, description="of the client's terminal, in characters")]
Interval = Annotated[
    float | None, QueryParameter(ge=0.1, le=3600, description="seconds between samples; default: one sample")
]
Inside = Annotated[str, QueryParameter(max_length=4096, description="an absolute path inside the instance")]
HowToCopy = Annotated[
    str | None,
    QueryParameter(
        description="as cp(1): `tree` puts the one tree of the archive into `path` if that is a directory, else there "
        "as `path`; `content` puts what is in it into the directory `path`"
    ),
]
