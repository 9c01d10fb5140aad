"""The description of the API, OpenAPI 3.1, at /openapi.json.

Litestar derives paths and parameters from the handlers. The rest is completed here, from the tables that the server
itself uses: security from the permissions (model/permissions.py), rules of values from the types of fields
(model/fields.py), errors from the classes of errors. A struct has one schema for all senders: what only those who see
the host are sent is not required in it (model/own_views.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin

import msgspec
from litestar import Litestar, Request, Response
from litestar.enums import OpenAPIMediaType
from litestar.routes import HTTPRoute

from insula.api.authorization import permission_of
from insula.api.cursors import MAX_CURSOR, PATTERN
from insula.api.examples import example_of
from insula.api.idempotency import MAX_KEY, REPLAYED, takes_key
from insula.api.narrowing import NARROW
from insula.api.problems import PROBLEM
from insula.api.streams import BYTES, EVENTS, FRAMES, NDJSON, PNG, TAR
from insula.model import own_views
from insula.model.errors import KINDS
from insula.model.permissions import BY_INVITATION, NOT_BY_TOKEN, OF_EVERYBODY, PERMISSIONS

PREFIX = "#/components/schemas/"
Schema = dict[str, Any]

TAGS = {
    "tenants": "Tenants and their limits",
    "identities": "Users, service accounts, roles, tokens, certificates",
    "networks": "Private networks of a tenant",
    "routers": "Routers between networks of a tenant",
    "policies": "Policies: which connections are allowed",
    "peerings": "Agreements of two tenants that some of their networks reach each other",
    "floating-ips": "External addresses that lead to instances",
    "load-balancers": "Addresses whose connections are spread over instances",
    "guarantees": "Floors and ceilings of bandwidth, floors of CPU and memory",
    "images": "Images of a tenant, and the shared ones",
    "instances": "Instances, their life cycle, input and output",
    "declared": "Objects as files declare them: apply, diff, dump",
    "host": "This host",
}
SECURITY: dict[str, Schema] = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "insula_ID_SECRET_CHECKSUM",
        "description": "A token. On a unix socket none is needed: the kernel proves which user of the host it is.",
    },
    "certificate": {"type": "mutualTLS", "description": "A client's certificate, by HTTPS."},
}
_BINARY: Schema = {"type": "string", "format": "binary"}
_STREAMS = {
    FRAMES: "Frames: see the description of this API.",
    NDJSON: "JSON lines; an error after the first one is a problem, as the last line.",
    TAR: "A tar archive.",
    BYTES: "A disk image.",
    PNG: "A picture.",
}
_HEADERS: Schema = {
    "x-request-id": {"description": "the entry of the audit log", "schema": {"type": "string", "maxLength": 64}}
}
_SERVER_SENT = "Server-sent events, if `Accept` names them: `data` is the JSON of an item, `id` the cursor after it."
_LAST_EVENT: Schema = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "as `cursor`: resume after the event of this ID",
    "schema": {"type": "string", "pattern": PATTERN, "maxLength": MAX_CURSOR},
}
_KEY: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A text of one's own choice. The same request with the same key, sent again within a day, is not "
    "carried out again: it gets the first answer.",
    "schema": {"type": "string", "pattern": "^[!#-~]+$", "maxLength": MAX_KEY, "examples": ["5d7a2f10-create-web"]},
}
_REPLAYED: Schema = {"description": "`true`: the answer to an earlier request", "schema": {"const": "true"}}
_NEXT: Schema = {"description": 'the next page, rel="next" (RFC 8288)', "schema": {"type": "string"}}
_PROBLEM: Schema = {
    "type": "object",
    "description": "Problem details (RFC 9457).",
    "required": ["type", "title", "status", "detail", "code", "hint"],
    "properties": {
        "type": {"type": "string", "format": "uri", "maxLength": 256},
        "title": {"type": "string", "maxLength": 256},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "what is wrong"},
        "code": {"type": "string", "enum": sorted(KINDS)},
        "hint": {"type": ["string", "null"], "description": "what to do"},
        "error": {"type": "string", "description": "as code", "deprecated": True},
        "message": {"type": "string", "description": "as detail", "deprecated": True},
        "exit_status": {"type": "string", "maxLength": 3, "description": "of `insula run` because of it"},
    },
}
_LINE: Schema = {"type": "object", "additionalProperties": True}
_LINES: dict[str, Schema] = {
    "Event": {
        **_LINE,
        "description": "A change of an object; further members depend on the action.",
        "required": ["time", "kind", "action"],
        "properties": {
            "time": {"type": "number", "description": "seconds since the epoch"},
            "kind": {"type": "string", "maxLength": 64},
            "action": {"type": "string", "maxLength": 1024},
            "tenant": {"type": ["string", "null"]},
            "name": {"type": ["string", "null"]},
            "cursor": {"type": "string", "maxLength": MAX_CURSOR, "description": "to resume after this event"},
        },
    },
    "Progress": {
        **_LINE,
        "description": "A line of progress, or at last the image.",
        "properties": {"progress": {"type": "string"}, "image": {"$ref": f"{PREFIX}Image"}},
    },
    "AuditEntry": {**_LINE, "description": "An entry of the audit log.", "required": ["time"]},
}
_ERRORS = {
    400: "The request is wrong; nothing was changed.",
    401: "The proof of who you are is not valid.",
    403: "You may see the object, but not do this.",
    404: "There is no such object, or you may not know of it.",
    409: "The name or address is taken, or the state does not allow this.",
    413: "The body is too large.",
    422: "A limit of the tenant forbids it, or the program of an instance can't be executed.",
    429: "Too many requests; Retry-After says when the next may come.",
    500: "Insula tried and failed, and has undone its work.",
    503: "This host lacks a requirement, or is stopping.",
}


class Document:
    """The description as it is sent. It is made when it is first asked for, in a thread: that takes 0.15 s."""

    def __init__(self) -> None:
        self._encoded = b""
        self._lock = asyncio.Lock()

    async def answer(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        """Answer in place of Litestar's handler, which makes it in the event loop (before_request)."""
        async with self._lock:
            if not self._encoded:
                self._encoded = await asyncio.to_thread(lambda: msgspec.json.encode(describe(request.app)))
        return Response(self._encoded, media_type=OpenAPIMediaType.OPENAPI_JSON)


def describe(app: Litestar) -> Schema:
    """Return Litestar's description of an application with everything that is said here. ValueError for two operations
    of one name. It blocks."""
    given = app.openapi_schema.to_schema()
    kinds: set[type[msgspec.Struct]] = set()
    names: set[str] = set()
    paths: Schema = {}
    for path, method, handler in operations(app):
        operation = given["paths"][path][method.lower()]
        kinds.update(structs_of(handler))
        made = _operation(operation, handler, method)
        if made["operationId"] in names:
            raise ValueError(f"two operations are called {made['operationId']}")
        names.add(made["operationId"])
        paths.setdefault(path, {})[method.lower()] = made
    components = {"schemas": _schemas(kinds), "responses": _responses(), "securitySchemes": SECURITY}
    tags = [{"name": name, "description": text} for name, text in TAGS.items()]
    info = {**given["info"], "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}}
    return {
        "openapi": "3.1.0",
        "info": info,
        "servers": [{"url": "/"}],
        "tags": tags,
        "paths": paths,
        "components": components,
    }


def operations(app: Litestar) -> Iterator[tuple[str, str, Any]]:
    """Yield every operation of the API as (path, method, handler)."""
    for route in app.routes:
        if isinstance(route, HTTPRoute) and route.path.startswith("/v1"):
            for method, (handler, _) in route.route_handler_map.items():
                if handler.resolve_include_in_schema():
                    yield route.path_format, method, handler


def structs_of(handler: Any) -> Iterator[type[msgspec.Struct]]:
    """Yield the structs of a handler's request, of its answer, and of the frames or lines of its streams."""
    signature = handler.parsed_fn_signature
    data = signature.parameters.get("data")
    for hint in (signature.return_type.annotation, data and data.annotation, handler.opt.get("opens")):
        yield from structs_in(hint)
    for answer in (handler.responses or {}).values():
        yield from structs_in(answer.data_container)


def structs_in(hint: Any) -> Iterator[type[msgspec.Struct]]:
    """Yield the structs in an annotation."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    for each in get_args(hint):
        yield from structs_in(each)


# -- operations ------------------------------------------------------------------------------------------------------


def _operation(given: Schema, handler: Any, method: str) -> Schema:
    permission = permission_of(handler, method)
    made = {
        "operationId": str(handler.handler_name),
        "tags": given["tags"],
        "summary": given["summary"],
        "description": _allowed(permission, given.get("description", "")),
        "security": _security(permission),
        "x-insula-permission": permission,
    }
    parameters = [_parameter(each) for each in given.get("parameters", [])]
    if takes_key(handler, method):
        parameters.append(_KEY)
    if handler.opt.get("resumable"):
        parameters.append(_LAST_EVENT)
    if parameters:
        made["parameters"] = parameters
    if body := _body(handler):
        made["requestBody"] = body
    made["responses"] = _answers(given, handler, parameters, bool(body))
    return made


def _allowed(permission: str, text: str) -> str:
    """The description of an operation: who may do it."""
    found = PERMISSIONS[permission]
    roles = "everybody" if permission in OF_EVERYBODY else ", ".join(found.roles) or "the holder of an invitation"
    return f"{text}\n\nIt takes the permission `{permission}` ({found.scope}): {roles}.".strip()


def _security(permission: str) -> list[Schema]:
    """What proves a sender that may hold this permission; the last one, nothing, is a process of the host."""
    if permission in BY_INVITATION:
        return [{"token": []}]
    certificate: list[Schema] = [{"certificate": []}, {}]
    return certificate if permission in NOT_BY_TOKEN else [{"token": []}, *certificate]


def _parameter(given: Schema) -> Schema:
    """A parameter, which has no null: an optional one is left out."""
    schema = given["schema"]
    for key in ("oneOf", "anyOf"):
        if key in schema:
            [only] = [each for each in schema.pop(key) if each.get("type") != "null"]
            schema = {**only, **schema}
    schema = {key: value for key, value in schema.items() if key != "default" or value is not None}
    made = {key: value for key, value in given.items() if key not in ("deprecated", "allowEmptyValue", "allowReserved")}
    return {**made, "schema": _whole_numbers(schema)}


def _whole_numbers(schema: Schema) -> Schema:
    """Bounds of integers as integers: 1.0 is 1."""
    if schema.get("type") != "integer":
        return schema
    bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    return {key: int(value) if key in bounds else value for key, value in schema.items()}


def _body(handler: Any) -> Schema | None:
    """The request's body: JSON, an archive or frames."""
    data = handler.parsed_fn_signature.parameters.get("data")
    if data is not None:
        content: Schema = {"schema": _schema_of(data.annotation)}
        if (example := example_of(data.annotation)) is not None:
            content["example"] = example
        return {"required": True, "content": {"application/json": content}}
    if takes := handler.opt.get("takes"):
        opens = handler.opt.get("opens")
        text = f"{_STREAMS[takes]} The first one is OPEN with an `{opens.__name__}`." if opens else _STREAMS[takes]
        return {"required": True, "description": text, "content": {takes: {"schema": _BINARY}}}
    return None


def _answers(given: Schema, handler: Any, parameters: list[Schema], body: bool) -> Schema:
    success = str(handler.status_code)
    answers: Schema = {success: {"description": given["responses"][success]["description"], "headers": _HEADERS}}
    if content := _content(handler):
        if handler.opt.get("server_sent"):
            content = {**content, EVENTS: {"schema": {"type": "string", "description": _SERVER_SENT}}}
        answers[success]["content"] = content
    if any(each["name"] == "limit" for each in given.get("parameters", [])):
        answers[success]["headers"] = {**_HEADERS, "link": _NEXT}
    if any(each is _KEY for each in parameters):
        answers[success]["headers"] = {**_HEADERS, REPLAYED: _REPLAYED}
    if success == "204":
        answers[success]["description"] = "It is done."
    left_out = set() if body else {413}
    if not body and all(each is _KEY for each in parameters):
        left_out |= {404}
    for status in _ERRORS:
        if status not in left_out:
            answers[str(status)] = {"$ref": f"#/components/responses/{status}"}
    return answers


def _content(handler: Any) -> Schema:
    sends = handler.opt.get("sends")
    if sends == NDJSON:
        return {NDJSON: {"schema": {"$ref": PREFIX + handler.opt.get("line", "Event")}}}
    if sends:
        return {sends: {"schema": _BINARY}}
    if handler.responses:
        [answer] = handler.responses.values()
        return {answer.media_type: {"schema": _schema_of(answer.data_container)}}
    hint = handler.parsed_fn_signature.return_type.annotation
    if hint in (None, type(None)):
        return {}
    content: Schema = {"schema": _schema_of(hint)}
    if (example := example_of(hint)) is not None:
        content["example"] = example
    return {"application/json": content}


# -- components ------------------------------------------------------------------------------------------------------


def _schema_of(hint: Any) -> Schema:
    """The schema of a struct or of a sequence of them, by reference."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return {"$ref": PREFIX + hint.__name__}
    if get_origin(hint) is Annotated:
        return _schema_of(get_args(hint)[0])
    if get_origin(hint) in (list, Sequence):
        return {"type": "array", "items": _schema_of(get_args(hint)[0])}
    raise TypeError(f"there is no schema for {hint}")


def _schemas(kinds: set[type[msgspec.Struct]]) -> Schema:
    """The schemas of all structs, with those in them, in the order of their names."""
    _, found = msgspec.json.schema_components(
        sorted(kinds, key=lambda kind: kind.__name__),
        schema_hook=lambda _: {"description": "any value"},
        ref_template=PREFIX + "{name}",
    )
    for full, own in _narrow_forms():
        if schema := found.get(full):
            hidden = set(schema["properties"]) - set(own.__struct_encode_fields__)
            schema["required"] = [name for name in schema.get("required", []) if name not in hidden]
    for name, schema in found.items():
        if name.endswith("Patch"):
            schema["minProperties"] = 1
    return dict(sorted({**found, **_LINES, "Problem": _PROBLEM}.items()))


def _narrow_forms() -> Iterator[tuple[str, type[msgspec.Struct]]]:
    """Yield the name of each struct with its form for tenants."""
    named = {own: full.__name__ for full, own in NARROW.items()}
    for name, kind in vars(own_views).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and name.startswith("Own"):
            yield named.get(kind, name.removeprefix("Own")), kind


def _responses() -> Schema:
    """The answers for errors, by status."""
    made: Schema = {}
    for status, text in _ERRORS.items():
        headers: Schema = {**_HEADERS}
        if status == 401:
            headers["www-authenticate"] = {"schema": {"type": "string", "maxLength": 64}}
        if status in (409, 429):
            headers["retry-after"] = {"description": "seconds", "schema": {"type": "integer", "minimum": 0}}
        made[str(status)] = {
            "description": text,
            "headers": headers,
            "content": {PROBLEM: {"schema": {"$ref": f"{PREFIX}Problem"}}},
        }
    return made
