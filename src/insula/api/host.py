"""/v1/status, doctor, verify, whois, events, down: this host."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from litestar import Controller, Request, get, post
from litestar.response import Stream

from insula.api.audit import watch
from insula.api.audit_routes import log_of
from insula.api.cursors import Cursors, context_of
from insula.api.pages import CursorText
from insula.api.parameters import Flag, Pid, Plane, Revision, Sender
from insula.api.server_sent import LAST_EVENT_ID, lines_or_events
from insula.api.streams import NDJSON, merged
from insula.control.identities.authority import Authority
from insula.model.views import Check, HostStatus, VerifyReport, WhoIs


class HostRoutes(Controller):
    path = "/"
    tags = ("host",)

    @get("/status", summary="The state of this host", permission="host.read")
    async def status(self, plane: Plane) -> HostStatus:
        return await plane.host.status()

    @get(
        "/doctor", summary="The requirements of this host, and the consequences of missing ones", permission="host.read"
    )
    async def doctor(self, plane: Plane) -> Sequence[Check]:
        return await plane.host.doctor()

    @get("/verify", summary="Compare wanted, installed and measured reachability", permission="host.read")
    async def verify(self, plane: Plane) -> VerifyReport:
        return await plane.host.verify()

    @post(
        "/verify/repair",
        status_code=200,
        summary="Install again what differs from what tenants want, and verify",
        permission="host.repair",
    )
    async def repair(self, plane: Plane) -> VerifyReport:
        return await plane.host.repair()

    @get("/whois/{pid:int}", summary="Which tenant and instance a host process belongs to", permission="host.read")
    async def whois(self, plane: Plane, pid: Pid) -> WhoIs:
        return await plane.host.whois(pid)

    @get(
        "/events",
        summary="Changes as they happen, one JSON object a line; with `audit` also entries of the audit log; with "
        "`verify` isolation is proven, as long as the stream is open, and whenever the kernel tells of a change",
        permission="self.read",
        quota="streams",
        sends=NDJSON,
        line="Event",
        server_sent=True,
        resumable=True,
    )
    async def events(
        self,
        plane: Plane,
        request: Request[Any, Any, Any],
        sender: Sender,
        from_revision: Revision = None,
        cursor: CursorText = None,
        audit: Flag = False,
        verify: Flag = False,
    ) -> Stream:
        """The store's revision counts the changes of all tenants: only those who see the host may name one. Everybody
        resumes by `cursor`, or Last-Event-ID, the cursor of the last event."""
        if audit:
            sender.check("audit.read")
        if from_revision is not None or verify:
            sender.check("host.read")
        after = cursor or request.headers.get(LAST_EVENT_ID)
        context = context_of(sender, "events")
        cursors: Cursors = request.app.state.cursors
        if after:
            from_revision = int(cursors.open(after, context))
        born = await plane.tenants.created() if after else {}
        changes = plane.events.watch(from_revision, lambda story: _may_see(sender, story, born))
        marked = _marked(changes, lambda revision: cursors.seal(f"{revision:020}", context))  # its length tells nothing
        sources = [marked, *([watch(log_of(request))] if audit else ())]
        if sender.sees_host:
            sources.append(plane.isolation.watched() if verify else plane.isolation.changes())
        return lines_or_events(request, merged(*sources), sender)

    @post(
        "/down",
        status_code=204,
        summary="Stop all instances, clean the host, and end insulad; the state is kept",
        permission="host.down",
    )
    async def down(self, plane: Plane, request: Request[Any, Any, Any]) -> None:
        await plane.host.down()
        request.scope["state"]["stopping"].set()  # the rest of the process could do nothing more


async def _marked(events: AsyncIterator[dict[str, Any]], seal: Callable[[int], str]) -> AsyncIterator[dict[str, Any]]:
    """Add to each event the cursor to resume after it."""
    async for event in events:
        revision = event.get("revision")
        yield event if revision is None else {**event, "cursor": seal(revision)}


def _may_see(sender: Authority, story: dict[str, Any], born: Mapping[str, int]) -> bool:
    """Whether an event is of a tenant of the sender's, and not of an earlier one of its name: `born` has the revisions
    that tenants were created at. A token for some labels gives none: events don't have them."""
    if sender.sees_host:
        return True
    tenant = story["tenant"]
    return tenant in sender.tenants and not sender.labels and story["revision"] >= born.get(tenant, 0)
