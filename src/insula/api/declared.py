"""Declared state: apply, diff and dump, in a tenant and (without one) on the host, and the schema of documents.

The path's tenant is that of every document, so that a file never reaches further than its sender has asked for. On
/v1/apply each document names its tenant itself.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, get, post
from litestar.params import JSONBody
from litestar.response import Stream

from insula.api.audit import note, part
from insula.api.parameters import Plane, Sender, TenantName
from insula.api.streams import NDJSON, json_lines, primed, while_connected
from insula.control.identities.authority import Authority
from insula.control.plane import ControlPlane
from insula.model.declared import ApplySpec, DeclaredItem

MAX_FILES = 8 << 20
"""Bytes of a request: a megabyte of text, and what escapes JSON needs."""
SCHEMA = "application/schema+json"
YAML = "application/yaml"
"""RFC 9512."""

_TAGS = ("declared",)
_TAKES_FILES: dict[str, Any] = {"tags": _TAGS, "request_max_body_size": MAX_FILES, "status_code": 200}
_APPLY: dict[str, Any] = {**_TAKES_FILES, "sends": NDJSON, "line": "DeclaredItem", "quota": "streams"}
_DIFF: dict[str, Any] = {**_TAKES_FILES, "repeatable": True}
_DUMP: dict[str, Any] = {"tags": _TAGS, "sends": YAML, "quota": "streams"}
"""What the routes of a tenant and of the host have in common."""


@post(
    "/tenants/{tenant:str}/apply",
    summary="Make a tenant's objects as files declare them; JSON lines, one for each object",
    permission="set.write",
    **_APPLY,
)
async def apply(
    plane: Plane, tenant: TenantName, sender: Sender, data: JSONBody[ApplySpec], request: Request[Any, Any, Any]
) -> Stream:
    return await _applied(plane, sender, tenant, data, request)


@post(
    "/apply",
    summary="The same for tenants, users, and all that tenants have; each document names its tenant",
    permission="host.apply",
    **_APPLY,
)
async def apply_on_host(
    plane: Plane, sender: Sender, data: JSONBody[ApplySpec], request: Request[Any, Any, Any]
) -> Stream:
    return await _applied(plane, sender, None, data, request)


async def _applied(
    plane: ControlPlane, sender: Authority, tenant: str | None, data: ApplySpec, request: Request[Any, Any, Any]
) -> Stream:
    note(name=data.set)

    def record(item: DeclaredItem, status: int) -> None:
        if status >= 400 or item.operation != "none":
            part(status, tenant=item.tenant, name=item.name, kind=item.kind, operation=item.operation, set=data.set)

    items = primed(plane.declared.apply(sender, tenant, data, record))
    return json_lines(await while_connected(request, items), sender)


@post(
    "/tenants/{tenant:str}/diff",
    summary="What `apply` would do in a tenant, with differences",
    permission="set.read",
    **_DIFF,
)
async def diff(plane: Plane, tenant: TenantName, sender: Sender, data: JSONBody[ApplySpec]) -> list[DeclaredItem]:
    return await plane.declared.diff(sender, tenant, data)


@post(
    "/diff",
    summary="The same for tenants, users, and all that tenants have",
    permission="user.read",
    **_DIFF,
)
async def diff_on_host(plane: Plane, sender: Sender, data: JSONBody[ApplySpec]) -> list[DeclaredItem]:
    return await plane.declared.diff(sender, None, data)


@get(
    "/tenants/{tenant:str}/dump",
    summary="A tenant's objects as documents, which `apply` takes",
    permission="set.read",
    **_DUMP,
)
async def dump(plane: Plane, tenant: TenantName, sender: Sender) -> Stream:
    return await _dumped(plane, sender, tenant)


@get(
    "/dump",
    summary="Tenants, users, and all that tenants have, as documents",
    permission="user.read",
    **_DUMP,
)
async def dump_on_host(plane: Plane, sender: Sender) -> Stream:
    return await _dumped(plane, sender, None)


async def _dumped(plane: ControlPlane, sender: Authority, tenant: str | None) -> Stream:
    return Stream(await primed(plane.declared.dump(sender, tenant)), media_type=YAML)


@get(
    "/schema",
    tags=_TAGS,
    summary="The JSON Schema of a document",
    permission="self.read",
    media_type=SCHEMA,
    sends=SCHEMA,
)
async def schema(plane: Plane) -> Response[bytes]:
    return Response(msgspec.json.encode(plane.declared.schema()), media_type=SCHEMA)


DECLARED = (apply, apply_on_host, diff, diff_on_host, dump, dump_on_host, schema)
