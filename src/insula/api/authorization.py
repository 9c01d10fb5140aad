"""Authorization: every route names its permission, which the sender of a request must hold.

The check runs before anything is looked up by a name in the request, so that neither an error nor its timing reveals
objects of another tenant. For a sender without a role in a tenant, the answer is as if it did not exist. `check_routes`
walks the routes of the application: insulad doesn't start if one has no permission, or one whose scope doesn't fit its
path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from litestar import Litestar
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from insula.api.audit import check
from insula.control.allocation.in_flight import Held
from insula.control.identities.authority import Authority
from insula.control.instances.checks import no_instance
from insula.control.plane import ControlPlane
from insula.model.permissions import PERMISSIONS

OPTIONS_PERMISSION = "self.read"
"""The permission of OPTIONS, which the framework adds to every path and which lists only the methods of the path."""


def authority_of(scope: Any) -> Authority:
    """Return the rights of a request, as `AccessMiddleware` has found them."""
    return cast(Authority, scope["state"]["authority"])


def permission_of(handler: BaseRouteHandler, method: str) -> str:
    return OPTIONS_PERMISSION if method == "OPTIONS" else str(handler.opt.get("permission", ""))


async def authorize(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Raise NotFound or Denied unless the sender may use this route on this tenant (a guard of Litestar)."""
    scope: Any = connection.scope
    permission = permission_of(handler, scope.get("method", ""))
    tenant = connection.path_params.get("tenant")
    authority = authority_of(scope)
    authority.check(permission, tenant)
    scope["state"]["permission"] = permission, tenant
    if getattr(handler, "request_max_body_size", 0) is None:
        scope["state"]["streams_body"] = True
    _count(connection, handler, authority, tenant)
    if authority.labels and permission.startswith("instance.") and "name" in connection.path_params:
        plane: ControlPlane = connection.app.state.plane
        await check_labels(authority, plane, str(tenant), str(connection.path_params["name"]))
    await check()


def _count(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler, authority: Authority, tenant: str | None
) -> None:
    """Count the request in the quotas of the tenant, or of its sender. TooManyRequests, QuotaExceeded.

    Only those who may use the tenant get here, so that nobody else can exhaust its quotas.
    """
    context = connection.app.state.plane.context
    if tenant is not None and tenant in authority.tenants:
        context.rates.check_tenant(tenant, context.limits.of(tenant).requests)
    name = handler.opt.get("quota")
    if name is None or connection.scope["method"] == "OPTIONS":  # type: ignore[typeddict-item]
        return
    if tenant is not None:
        hold(connection.scope, context.in_flight.of_tenant(tenant, name)).take()
    elif authority.principal is not None:
        hold(connection.scope, context.in_flight.of_user(authority.principal.label)).take()


def hold(scope: Any, held: Held) -> Held:
    """Release what is held when the request has ended; see `AccessMiddleware`."""
    scope["state"].setdefault("holds", []).append(held)
    return held


async def check_labels(authority: Authority, plane: ControlPlane, tenant: str, name: str) -> None:
    """Raise NotFound for an instance without the labels that the sender's token is for."""
    view = await plane.instances.get(tenant, name)
    if not authority.labels.items() <= view.instance.spec.labels.items():
        raise no_instance(tenant, name)


def handlers(app: Litestar) -> Iterator[tuple[str, str, BaseRouteHandler]]:
    """Yield every route of the application as (path, method, handler): also what the framework has added."""
    for route in app.routes:
        found = getattr(route, "route_handlers", None) or [getattr(route, "route_handler")]  # noqa: B009
        for handler in found:
            for method in sorted(getattr(handler, "http_methods", ())) or ["*"]:
                yield route.path, str(method), handler


def check_routes(app: Litestar) -> None:
    """Raise ValueError for a route without a permission, or with one whose scope doesn't fit its path."""
    for path, method, handler in handlers(app):
        name = permission_of(handler, method)
        permission = PERMISSIONS.get(name)
        if permission is None:
            raise ValueError(f"{method} {path} has no permission of the table: {name!r}")
        if permission.scope == "tenant" and "{tenant:" not in path:
            raise ValueError(f"{method} {path} names no tenant for {name}")
