"""/v1/migrations: instances that move to this host, and from it."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, post
from litestar.params import JSONBody
from litestar.types import ASGIApp, Receive, Scope, Send

from insula.api.audit import note
from insula.api.authorities import server_authorities
from insula.api.duplex import Incoming, opening
from insula.api.open_requests import ENDS_ITSELF
from insula.api.parameters import Name, Plane, Sender, TenantName
from insula.api.streams import FRAMES
from insula.control.instances.migrating import OUTCOME, Migrating
from insula.control.instances.migration_link import PATH
from insula.model.errors import Conflict, InsulaError
from insula.model.migration import MigrationOffer, MigrationOutcome, MigrationQuery, MigrationTarget, MigrationTicket
from insula.model.stream import Kind, encode


@post(
    "/tenants/{tenant:str}/migrations",
    tags=["instances"],
    summary="Get a ticket, by which another host may send one instance of the tenant here",
    permission="instance.write",
)
async def create_ticket(plane: Plane, tenant: TenantName, sender: Sender) -> MigrationTicket:
    if not plane.settings.api.listen:
        what = "this host is not reached by HTTPS, by which instances are sent"
        raise Conflict(what, "set [api] listen in insulad.toml(5)")
    return await plane.migrating.ticket(tenant, await server_authorities(plane), by=sender)


@post(
    "/tenants/{tenant:str}/instances/{name:str}/migrate",
    status_code=204,
    tags=["instances"],
    summary="Move it to another host while it runs, with the ticket of there",
    permission="instance.write",
)
async def migrate(plane: Plane, tenant: TenantName, name: Name, data: JSONBody[MigrationTarget]) -> None:
    note(to=", ".join(data.addresses)[:200])
    await plane.migrating.migrate(tenant, name, data)


class RequestLink:
    """The connection to a host that sends an instance: its request, and our answer."""

    def __init__(self, incoming: Incoming, send: Send) -> None:
        self._incoming, self._send = incoming, send

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        if self._incoming.gone:
            raise ConnectionResetError
        await self._send({"type": "http.response.body", "body": encode(kind, payload), "more_body": True})

    async def next(self) -> tuple[Kind, bytes] | None:
        return await self._incoming.next()


class Receiving:
    """An ASGI response that receives an instance."""

    def __init__(self, migrating: Migrating, offer: MigrationOffer, incoming: Incoming) -> None:
        self._migrating, self._offer, self._incoming = migrating, offer, incoming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"][ENDS_ITSELF] = True
        headers = [(b"content-type", FRAMES.encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        link = RequestLink(self._incoming, send)
        try:
            await self._migrating.receive(self._offer, link)
        except InsulaError as error:
            said = msgspec.json.encode({"error": error.message, "hint": error.hint})
            await send({"type": "http.response.body", "body": encode(Kind.MESSAGE, said), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@post(
    PATH.removeprefix("/v1"),
    status_code=200,
    request_max_body_size=None,
    tags=["instances"],
    summary="Send an instance here, by a ticket: frames, both ways",
    permission="self.migration",
    quota="streams",
    takes=FRAMES,
    opens=MigrationOffer,
    sends=FRAMES,
)
async def receive_instance(plane: Plane, request: Request[Any, Any, Any]) -> ASGIApp:
    """The body's first frame is OPEN with a `MigrationOffer`."""
    offer, incoming = await opening(request, MigrationOffer)
    note(name=offer.spec.name)
    return Receiving(plane.migrating, offer, incoming)


@post(
    OUTCOME.removeprefix("/v1"),
    status_code=200,
    tags=["instances"],
    summary="Whether the instance of a ticket has arrived; if not, it never will by that ticket",
    permission="self.migration",
    repeatable=True,
)
async def migration_outcome(plane: Plane, data: JSONBody[MigrationQuery]) -> MigrationOutcome:
    return await plane.migrating.outcome(data.secret)


MIGRATIONS = (create_ticket, migrate, receive_instance, migration_outcome)
