"""All resources in one application, below /v1, with its description at /openapi.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litestar import Litestar, Request, Router
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import NotFoundException
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.types import ASGIApp

from insula import __version__
from insula.api.access import AccessMiddleware
from insula.api.answers import Answer
from insula.api.audit_routes import AuditRoutes
from insula.api.authorities import HTTPS, AuthorityRoutes
from insula.api.authorization import authority_of, authorize, check_routes
from insula.api.cursors import load
from insula.api.declared import DECLARED
from insula.api.endpoints import ServiceEndpointRoutes
from insula.api.errors import HANDLERS
from insula.api.floating_ips import FloatingIpRoutes
from insula.api.guarantees import GuaranteeRoutes
from insula.api.host import HostRoutes
from insula.api.idempotency import IdempotencyMiddleware, begin
from insula.api.identities import (
    BindingRoutes,
    CertificateRoutes,
    HostBindingRoutes,
    ServiceAccountRoutes,
    TokenRoutes,
    UserRoutes,
    invite,
    join,
    whoami,
)
from insula.api.images import ImageRoutes
from insula.api.instances import InstanceRoutes, list_all_instances, run_attached
from insula.api.load_balancers import LoadBalancerRoutes
from insula.api.login import login
from insula.api.metrics import host_metrics, tenant_metrics
from insula.api.migrations import MIGRATIONS
from insula.api.networks import NetworkRoutes
from insula.api.openapi import Document
from insula.api.outbox import Outbox
from insula.api.pages import PAGES
from insula.api.parameters import Plane
from insula.api.peerings import PeeringRoutes
from insula.api.policies import AddressGroupRoutes, EffectivePolicyRoutes, OperatorPolicyRoutes, PolicyRoutes
from insula.api.redaction import pattern_of
from insula.api.request_times import RequestTimes
from insula.api.routers import RouterRoutes
from insula.api.snapshots import SnapshotRoutes
from insula.api.stats import STATS
from insula.api.tenants import TenantRoutes
from insula.api.tracing import TraceRoutes
from insula.api.usage import USAGE_ROUTES
from insula.audit.writer import AuditLog
from insula.control.plane import ControlPlane

if TYPE_CHECKING:
    from insula.api.tls.supervisor import TlsSupervisor

MAX_BODY = 1 << 20
"""Bytes of a JSON body; uploads have a limit of their own."""

DOCUMENT = "/openapi.json"
DESCRIPTION = """\
HTTP on a unix socket, or HTTPS. Errors are problems (RFC 9457) with `code` and `hint`. Bodies of type
`application/vnd.insula.frames` are frames: one byte of kind, four bytes of length (big endian), payload.

| kind | | payload |
|---|---|---|
| 0, 3 | STDIN, STDIN_EOF | bytes for the standard input; nothing |
| 1, 2 | STDOUT, STDERR | bytes of output |
| 4 | RESIZE | rows and columns, two bytes each |
| 5 | EXIT | `{exit_status, signal, oom}` |
| 6 | ERROR | a problem |
| 7 | IDLE | nothing |
| 8 | OPEN | what to execute, an ExecSpec: the first frame of an exec |
| 9 | SIGNAL | one byte: the number of a signal for the process |
| 10 | MESSAGE | JSON, between hosts |
| 11, 12 | DISK, MEMORY | bytes of a machine that moves |
"""


def create_app(
    plane: ControlPlane,
    audit: AuditLog | None = None,
    socket: str = "",
    https: TlsSupervisor | None = None,
    outbox: Outbox | None = None,
) -> ASGIApp:
    """Make the ASGI application of `insulad`, behind its gate; `socket` is its address."""
    app = application(plane, audit, outbox)
    app.state[HTTPS] = https
    check_routes(app)
    return AccessMiddleware(
        IdempotencyMiddleware(app),
        plane.identity_cache,
        plane.context.rates,
        audit,
        socket,
        app.state.times,
        outbox,
        plane.providers,
        pattern_of((plane.settings.root, plane.settings.run)),
    )


async def only_the_document(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Raise NotFoundException beside /openapi.json, where the framework has pages of HTML (a guard of Litestar)."""
    if connection.scope["path"] != DOCUMENT:
        raise NotFoundException


def application(plane: ControlPlane, audit: AuditLog | None, outbox: Outbox | None = None) -> Litestar:
    """Make the application without its gate."""

    # each depends on the one before: those that could be made at once take a task each, a fifth of a short request
    async def provide_plane() -> object:
        return plane

    async def provide_sender(request: Request[Any, Any, Any], plane: Plane) -> object:
        return authority_of(request.scope)

    return Litestar(
        [
            Router(
                "/v1",
                route_handlers=[
                    TenantRoutes,
                    UserRoutes,
                    ServiceAccountRoutes,
                    BindingRoutes,
                    HostBindingRoutes,
                    TokenRoutes,
                    CertificateRoutes,
                    AuthorityRoutes,
                    invite,
                    join,
                    login,
                    whoami,
                    NetworkRoutes,
                    RouterRoutes,
                    TraceRoutes,
                    PolicyRoutes,
                    EffectivePolicyRoutes,
                    AddressGroupRoutes,
                    OperatorPolicyRoutes,
                    PeeringRoutes,
                    ServiceEndpointRoutes,
                    FloatingIpRoutes,
                    LoadBalancerRoutes,
                    GuaranteeRoutes,
                    ImageRoutes,
                    InstanceRoutes,
                    SnapshotRoutes,
                    HostRoutes,
                    AuditRoutes,
                    *MIGRATIONS,
                    *STATS,
                    *DECLARED,
                    *USAGE_ROUTES,
                    tenant_metrics,
                    list_all_instances,
                    run_attached,
                ],
            ),
            host_metrics,
        ],
        dependencies={"plane": Provide(provide_plane), "sender": Provide(provide_sender), **PAGES},
        exception_handlers=HANDLERS,
        response_class=Answer,
        guards=[authorize],
        before_request=begin,
        request_max_body_size=MAX_BODY,
        openapi_config=OpenAPIConfig(
            title="Insula",
            version=__version__,
            description=DESCRIPTION,
            path="/",
            render_plugins=[JsonRenderPlugin(path=DOCUMENT)],
            openapi_router=Router(
                "/",
                route_handlers=[],
                opt={"permission": "self.read"},
                guards=[only_the_document],
                before_request=Document().answer,
            ),
        ),
        logging_config=None,
        state=State(
            {
                "audit": audit,
                "outbox": outbox,
                "plane": plane,
                "cursors": load(plane.settings.root / "cursors.key"),
                "times": RequestTimes(),
            }
        ),
    )
