"""Exceptions as HTTP responses: the error's status, and a problem as JSON (RFC 9457)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException

from insula.api.audit import note
from insula.api.problems import PROBLEM, fields_of
from insula.api.redaction import problem_of
from insula.model.errors import Conflict, Denied, Failed, InsulaError, Invalid, NotFound, defect

log = logging.getLogger("insula.api")
_BY_STATUS: dict[int, type[InsulaError]] = {403: Denied, 404: NotFound, 409: Conflict}


def answer(
    error: InsulaError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response[dict[str, Any]]:
    """Return the response for an error; `status` is another one than the error's own."""
    note(error=type(error).__name__)
    fields = {**(headers or {}), **{name.decode(): value.decode() for name, value in fields_of(error)}}
    return Response(
        problem_of(error, status), status_code=status or error.http_status, media_type=PROBLEM, headers=fields
    )


def on_insula_error(_: Request[Any, Any, Any], error: InsulaError) -> Response[dict[str, Any]]:
    return answer(error)


def on_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[dict[str, Any]]:
    """Handle errors of the framework: unknown paths, wrong methods, malformed bodies and parameters."""
    status = error.status_code
    if status == 404:
        problem: InsulaError = NotFound(f"there is no {request.url.path}", "see /openapi.json")
    elif status == 405:
        problem = Invalid(f"{request.url.path} has no {request.method}", "see /openapi.json")
        return answer(problem, status, error.headers)  # with Allow (RFC 9110, 15.5.6)
    elif status == 413:
        return answer(Invalid("the request's body is too large", "send less"), status)
    elif status < 500:
        return answer(_BY_STATUS.get(status, Invalid)(explain(error), "see /openapi.json"))
    else:
        log.error("%s %s: %s", request.method, request.url.path, error.detail, exc_info=error)
        problem = Failed("the request failed inside insulad", "see insulad's log")
    return answer(problem)


def explain(error: HTTPException) -> str:
    """Return one line with the wrong part of the request, and the reason."""
    extra = error.extra if isinstance(error.extra, list) else []
    parts = [
        f"{item['key']}: {item['message']}" if item.get("key") and item["key"] != "data" else str(item["message"])
        for item in extra
        if isinstance(item, dict) and "message" in item
    ]
    return "; ".join(parts)[:500] or error.detail.splitlines()[0][:500]


def on_other_error(request: Request[Any, Any, Any], error: Exception) -> Response[dict[str, Any]]:
    """Handle a defect of insulad. The log has the traceback; the response has no internal details."""
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    return answer(defect(error))


def on_bad_body(request: Request[Any, Any, Any], error: Exception) -> Response[dict[str, Any]]:
    """Handle what msgspec raises beside its own errors, or a defect if the body was already read."""
    if _is_beyond_the_api(error):
        return on_other_error(request, error)
    what = "nested too deeply" if isinstance(error, RecursionError) else "not UTF-8"
    return answer(Invalid(f"the request's body is {what}", "see /openapi.json"))


def _is_beyond_the_api(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        if module.startswith("insula.") and not module.startswith("insula.api."):
            return True
        trace = trace.tb_next
    return False


HANDLERS: Any = {
    InsulaError: on_insula_error,
    HTTPException: on_http_error,
    RecursionError: on_bad_body,
    UnicodeDecodeError: on_bad_body,
    Exception: on_other_error,
}
