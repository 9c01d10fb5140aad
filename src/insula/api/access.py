"""Middleware: authenticates requests, ends them when their sender loses the right to them, logs and audits.

A request may last for days: logs, events, attach, exec, vnc. It is ended when the daemon stops, when the proof of its
sender expires or is revoked, and when the sender's roles no longer allow it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from typing import Any
from urllib.parse import quote

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from insula.api.audit import READS, AuditedRequest
from insula.api.authentication import authenticate
from insula.api.open_requests import OpenRequest, OpenRequests
from insula.api.outbox import Outbox
from insula.api.patience import Patient
from insula.api.peer import Peer, allowed, group_id
from insula.api.problems import refuse
from insula.api.redaction import hide, pattern_of
from insula.api.request_times import RequestTimes
from insula.api.sources import network_of
from insula.api.tls.record import ClientRecord
from insula.audit.writer import AuditLog
from insula.control.allocation.rates import Rates
from insula.control.identities.authority import NOBODY, Authority
from insula.control.identities.cache import IdentityCache
from insula.control.identities.providers import Providers
from insula.control.instances.migrating import OUTCOME
from insula.control.instances.migration_link import PATH
from insula.model.errors import InsulaError, TooManyRequests, Unavailable, defect

log = logging.getLogger("insula.access")
GRACE = 1.0
"""Seconds for requests to finish after the server was told to stop: followers of logs or events never finish."""
LOGIN = "/v1/login"
WITHOUT_PROOF = frozenset({LOGIN, PATH, OUTCOME})
"""The paths of the requests that nobody needs a proof for: to log in, and to send an instance by a ticket."""
_PATH = 200  # characters of a path in the log
_HOST = (b"host", b"insula")


class AccessMiddleware:
    """The middleware. Unknown clients get an error before their request is parsed. `GRACE` seconds after the event
    "stopping" in the server's state all requests are ended."""

    def __init__(
        self,
        app: ASGIApp,
        cache: IdentityCache,
        rates: Rates,
        audit: AuditLog | None = None,
        socket: str = "",
        times: RequestTimes | None = None,
        outbox: Outbox | None = None,
        providers: Providers | None = None,
        hidden: re.Pattern[str] | None = None,
    ) -> None:
        self.app = app
        self.cache = cache
        self.rates = rates
        self.providers = providers
        self.hidden = hidden or pattern_of(())
        self.audit = audit
        self.socket = socket
        self.times = times or RequestTimes()
        self.outbox = outbox
        self.group = group_id()
        self._open = OpenRequests()
        self._bodies: Counter[str] = Counter()
        self._stopping: asyncio.Task[None] | None = None
        cache.watchers.add(self._rights_changed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state: Any = scope["state"]
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(state["stopping"]))
        entry = AuditedRequest(self.audit, scope, state.get("peer"), self.socket, self.outbox)
        peer, client = state.get("peer"), state.get("client")
        try:
            anybody = scope.get("path") in WITHOUT_PROOF
            authority = await authenticate(
                self.cache, self.providers, peer, client, scope["headers"], self.group, anybody=anybody
            )
        except InsulaError as error:
            error = self._counted_failure(error, peer, client)
            self.times.observe(scope, error.status, 0.0)
            entry.refused(error)
            await refuse(error, send)
            return
        state["authority"] = entry.authority = authority
        hide(None if authority.sees_host else self.hidden)
        try:
            if authority.principal is not None:
                self.rates.check_principal(authority.principal.id)
            elif authority is NOBODY:
                self.rates.check_anonymous(network_of(client, peer))
        except TooManyRequests as error:
            entry.refused(error)
            self.times.observe(scope, error.status, 0.0)
            await refuse(error, send)
            return
        # the framework fails at a field that is no host or missing; nothing depends on what clients write there
        scope["headers"] = [*(each for each in scope["headers"] if each[0] != b"host"), _HOST]
        patient = Patient(receive, state, self._bodies, _sender_of(authority))
        try:
            await self._serve(scope, patient, send, entry)
        finally:
            patient.close()

    def _counted_failure(self, error: InsulaError, peer: Peer | None, client: ClientRecord | None) -> InsulaError:
        """Count a failed authentication of its source. Return the error, or TooManyRequests if there were many.

        It is counted after the whole check, whose work is the same for every proof. A valid proof is never refused
        because of others' failures: who shares an address with an attacker is not locked out. Clients that may use the
        operator's socket are not counted.
        """
        if client is None and peer is not None and allowed(peer, self.group):
            return error
        try:
            self.rates.check_failure(network_of(client, peer))
        except TooManyRequests as many:
            return many
        return error

    async def _serve(self, scope: Scope, receive: Receive, send: Send, entry: AuditedRequest) -> None:
        status, begun = 0, time.monotonic()

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start" and scope.get("method") not in READS:
                await self._open.cut()  # of what it may have revoked
            await request.unless_silent()
            request.answering = True
            request.complete = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                request.media = dict(message.get("headers") or ()).get(b"content-type", b"").decode("latin-1")
                if self.audit:
                    message["headers"] = [*(message.get("headers") or ()), (b"x-request-id", entry.id.encode())]
                status = message.get("status", status)
                self.times.observe(scope, status, time.monotonic() - begun)
            if request.unchecked and message.get("more_body"):
                request.check(self.cache)
                await request.unless_silent()
                await asyncio.sleep(0)  # is cancelled here
            entry.sending(message)
            await send(message)

        task = asyncio.ensure_future(self.app(scope, entry.receiving(receive), noting_send))
        request = OpenRequest(self._open, task, entry, send)
        timer = self._expiry(request)
        self._open.add(request)
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            self._open.discard(request)
            for held in request.holds:
                held.release()
            if timer:
                timer.cancel()
            entry.end()  # the status of a request that was aborted
            if log.isEnabledFor(logging.DEBUG):
                took = (time.monotonic() - begun) * 1000
                path = quote(scope["path"], safe="/:@,+=~")[:_PATH]  # a newline in it would start a new log line
                log.debug("%s %s %s status=%d ms=%.1f", scope.get("method"), path, entry.sender, status, took)
        if task.cancelled():
            if request.last is not None:
                await request.last
            elif not request.answering:
                await refuse(request.why or Unavailable("insulad is stopping", "try again later"), send)
        elif (error := task.exception()) is not None:
            log.error("%s %s", scope.get("method"), entry.sender, exc_info=error)
            if request.answering:
                raise error
            await refuse(defect(error), send)

    # -- ending requests -------------------------------------------------------------------------------------------

    async def _stop(self, stopping: asyncio.Event) -> None:
        """End all requests a moment after the server was told to stop."""
        await stopping.wait()
        await asyncio.sleep(GRACE)
        for request in tuple(self._open):
            request.end(Unavailable("insulad is stopping", "try again later"))

    def _expiry(self, request: OpenRequest) -> asyncio.TimerHandle | None:
        """Look at the request again when the proof of its sender expires."""
        if (expires := request.authority.expires) is None:
            return None
        left = max(0.0, expires - time.time())
        return asyncio.get_running_loop().call_later(left, request.check, self.cache)

    def _rights_changed(self, principal: str) -> None:
        self._open.check(principal, self.cache)


def _sender_of(authority: Authority) -> str | None:
    """Whose bodies are counted together: those of a principal, or of a tenant's service accounts. None is the operator,
    whose are not counted."""
    if (principal := authority.principal) is None:
        return None
    return f"tenant {principal.tenant}" if principal.tenant else principal.id
