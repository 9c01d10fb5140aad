"""Entries of the audit log for requests: who, by which proof, from where, what, on what, the result, how long it took.

Recorded are requests that change something, those that read an instance's own data (logs, archive, export), and every
request that fails. Bodies are not recorded, except names: commands, variables and passwords may be secret.

A request is one line, written when it ends, before the end of its response can be seen. Until then its intent is in
the store, committed with its change (`api/outbox.py`). Two kinds are two lines, of `phase` "begun" and "ended":
requests that may last for days, and those whose effect no transaction carries, which are recorded before they begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from litestar.types import Message, Receive, Scope

from insula.api.outbox import Intent, Outbox
from insula.api.peer import Peer
from insula.api.request_times import plain_route
from insula.api.sources import network_of, network_of_address
from insula.api.tls.record import ClientRecord
from insula.audit.reader import timestamp
from insula.audit.writer import AuditLog
from insula.control import carried
from insula.control.identities.authority import NOBODY, Authority
from insula.model.errors import Failed, InsulaError, Unavailable

_READS_DATA = ("/logs", "/archive", "/export")
READS = ("GET", "HEAD", "OPTIONS")
_CHANGES_NOTHING = ("/wait", "/diff")
_LASTING = ("/exec", "/attach", "/vnc", "/run", "/images/save", *_READS_DATA)  # they may last for days
_AHEAD = (
    "/attach",
    "/vnc",
    "/kill",
    "/archive",
    "/logs",
    "/export",
    "/images/push",
    "/images/pull",
    "/images/save",
    "/down",
)
_PATIENCE = 2.0  # seconds that a request waits for its line, while the disk is slow
_MOST_WAITING = 10_000  # entries in the queue of one watcher
_LONGEST = 256  # characters of a name
_SECRET = re.compile(r"^[^/]*@(?=[^/]*/)")  # user and password before a registry's name
_current: ContextVar[AuditedRequest | None] = ContextVar("request", default=None)


def note(**details: object) -> None:
    """Add a field, such as `name` or `error`, to the entry of the current request."""
    request = _current.get()
    if request is not None:
        request.details.update({key: value for key, value in details.items() if value is not None})


def part(status: int, **details: object) -> None:
    """Record a part of the current request that is a change of its own, such as one object of many. It may be done when
    the request has ended already, because its client has gone."""
    request = _current.get()
    if request is not None:
        request.part(status, details)


def is_recorded() -> bool:
    """Whether the current request has an entry."""
    return _current.get() is not None


async def announce() -> None:
    """Record the beginning of the current request before it does anything. Unavailable if changes can't be recorded."""
    request = _current.get()
    if request is not None:
        await request.announce()


async def check() -> None:
    """Prepare the current request, which its sender may send. Unavailable if it is a change, and can't be recorded."""
    request = _current.get()
    if request is not None:
        await request.check()


def without_secret(reference: str) -> str:
    """Return a reference to an image without a user's name and password."""
    return _SECRET.sub("", reference)


class AuditedRequest:
    """The entry of a running request, and its intent."""

    def __init__(
        self, log: AuditLog | None, scope: Scope, peer: Peer | None, socket: str, outbox: Outbox | None = None
    ) -> None:
        self.id = os.urandom(8).hex()
        self.details: dict[str, object] = {}
        self.authority: Authority = NOBODY
        self._log = log
        self._scope: Any = scope
        self.state: Any = scope["state"]
        self._peer = peer
        self._socket = socket
        self._began = time.time()
        self._status: int | None = None
        self._announced = self._ended = False
        self._received = self._sent = 0
        self._head: dict[str, Any] | None = None  # of the entry, once the route is known
        self._outbox = outbox
        self._intent = Intent(outbox, self._about) if outbox and scope.get("method") not in READS else None
        if log is not None:
            _current.set(self)
        if self._intent is not None:
            carried.current.set(self._intent)

    # -- what happens to the request -------------------------------------------------------------------------------

    def receiving(self, receive: Receive) -> Receive:
        """Return `receive`, which counts the bytes of the body."""

        async def counting() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                self._received += len(message["body"])
            return message

        return counting

    def sending(self, message: Message) -> None:
        """Look at a message of the response, before it is sent."""
        if self._log is None:
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if self._status < 400 and self._template().endswith(_LASTING):
                self._record_begin()
        elif message["type"] == "http.response.body":
            self._sent += len(message.get("body", b""))
            if not message.get("more_body"):
                self.end()

    async def check(self) -> None:
        """Refuse a change that can't be recorded, and record what is to be recorded before it begins."""
        if self._log is None or not self._is_recorded():
            return
        if self._log.full and self._scope["method"] not in READS:
            raise Unavailable(
                f"changes are refused, because the audit log can't be written: {self._log.trouble}",
                "make room on its disk; reading goes on",
            )
        if self._template().endswith(_AHEAD):
            await self.announce()

    async def announce(self) -> None:
        """Record the beginning, and wait until the line is in the file. While the file can't be written it waits in
        memory, until there are so many that changes are refused."""
        if self._log is None or self._announced:
            return
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def written() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_settle, done)

        self._record_begin(written)
        if self._log.trouble is None:
            await asyncio.wait((done,), timeout=_PATIENCE)

    def refused(self, error: InsulaError) -> None:
        """Record a request of a client that may not use the daemon."""
        self._status = error.status
        self.details["error"] = type(error).__name__
        self.end()

    def end(self) -> None:
        """Record the result, once. Later transactions don't carry the intent."""
        log, number = self._log, self._intent.end() if self._intent else None
        if log is None or self._ended:
            return
        self._ended = True
        failed = self._status is None or self._status >= 400
        if not (failed or self._announced or self._is_recorded()):
            self._release(number)
            return
        entry = {**self._about(), "status": self._status, "ms": round((time.time() - self._began) * 1000, 1)}
        if self._announced:
            entry |= {"phase": "ended", "received": self._received, "sent": self._sent}
        if failed and not self._announced and number is None and self.authority.proof != "socket":
            log.record_failure(entry, self._origin(), proved=self.authority.principal is not None)
        else:
            log.record(entry, synced=self._releasing(number))

    def part(self, status: int, details: dict[str, object]) -> None:
        """Record a part of the request, with its id."""
        shown = {key: str(value)[:_LONGEST] for key, value in details.items() if value is not None}
        entry = {**self._about(), "time": timestamp(time.time()), **shown, "status": status}
        if self._log is None:
            return
        if status >= 400 and self.authority.proof != "socket":
            self._log.record_failure(entry, self._origin(), proved=self.authority.principal is not None)
        else:
            self._log.record(entry)

    def _record_begin(self, written: Any = None) -> None:
        if self._log is not None and not self._announced:
            self._announced = True
            number = self._intent.end() if self._intent else None
            self._log.record({**self._about(), "phase": "begun"}, written, self._releasing(number))

    def _releasing(self, number: int | None) -> Any:
        """Return what frees the slot of the intent, from another thread."""
        if number is None:
            return None
        loop = asyncio.get_running_loop()

        def synced() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._release, number)

        return synced

    def _release(self, number: int | None) -> None:
        if number is not None and self._outbox is not None:
            self._outbox.release(number)

    # -- the entry -------------------------------------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        """Return the entry as far as it is known now, without a result."""
        parameters = self._scope.get("path_params") or {}
        name = parameters.get("name") or parameters.get("network")
        tenant = parameters.get("tenant")
        details = dict(self.details)
        if "tenant" in details:
            tenant = details.pop("tenant")
        name = details.pop("name", None) or (name and str(name).lstrip("/"))
        if self._head is None:
            principal = self.authority.principal
            self._head = {
                "time": timestamp(self._began),
                "id": self.id,
                "user": self.authority.name,
                "principal": principal and principal.id,
                "proof": self.authority.proof,
                **self._source(),
                "verb": f"{self._scope['method']} {self._template() or self._scope['path']}"[:_LONGEST],
            }
        return {
            **self._head,
            "tenant": tenant and str(tenant)[:_LONGEST],
            "name": name and str(name)[:_LONGEST],
            **{key: str(value)[:_LONGEST] for key, value in details.items()},
        }

    def _source(self) -> dict[str, object]:
        """Where the request comes from: an address of the network, or a process of the host."""
        client: ClientRecord | None = self._scope["state"].get("client")
        if client is not None:
            return {"uid": None, "gid": None, "pid": None, "address": client.address, "port": client.port}
        if self._peer is None:
            return {"uid": None, "gid": None, "pid": None, "socket": self._socket}
        return {"uid": self._peer.uid, "gid": self._peer.gid, "pid": self._peer.pid, "socket": self._socket}

    def _origin(self) -> str:
        """What counts as one source of failed attempts."""
        if self.authority.principal is not None:
            return f"{self.authority.name} {self.authority.principal.id}"
        return network_of(self._scope["state"].get("client"), self._peer)

    @property
    def sender(self) -> str:
        """The sender, for the log."""
        shown = ("uid", "pid", "address")
        source = {name: value for name, value in self._source().items() if value is not None and name in shown}
        return " ".join([f"user={self.authority.name}", *(f"{name}={value}" for name, value in source.items())])

    def _template(self) -> str:
        """Return the route, as in ``/v1/tenants/{tenant}/instances``; empty if there is none for this path."""
        return plain_route(self._scope.get("path_template") or "")

    def _is_recorded(self) -> bool:
        template = self._template() or self._scope["path"]
        if self._scope["method"] in READS:
            return template.endswith(_READS_DATA) and "/instances/" in template
        return not template.endswith(_CHANGES_NOTHING)


def record_malformed(log: AuditLog, peer: Peer | None, client: ClientRecord | None) -> None:
    """Record what somebody has sent that is not HTTP."""
    about = {"user": "nobody", "proof": "none", "verb": "not HTTP", "tenant": None, "name": None, "status": 400}
    source = {"address": client.address, "port": client.port} if client else {}
    process = {"uid": peer.uid, "gid": peer.gid, "pid": peer.pid} if peer and not client else {}
    entry: dict[str, Any] = {"time": timestamp(time.time()), "id": os.urandom(8).hex(), **about, **source, **process}
    log.record_failure({**entry, "ms": 0.0, "error": "Invalid"}, network_of(client, peer), proved=False)


def record_event(log: AuditLog, event: dict[str, Any]) -> None:
    """Record what the gate of HTTPS tells: a handshake that failed, from where and why."""
    moment = timestamp(float(event.get("time") or time.time()))
    about = {"user": "nobody", "proof": "none", "verb": "TLS handshake", "tenant": None, "name": None, "status": 401}
    details: dict[str, Any] = {key: str(event[key])[:_LONGEST] for key in ("address", "error") if key in event}
    entry: dict[str, Any] = {"time": moment, "id": os.urandom(8).hex(), **about, "ms": 0.0, **details}
    source = network_of_address(details["address"]) if "address" in details else "the gate"
    log.record_failure(entry, source, proved=False)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def watch(log: AuditLog) -> AsyncIterator[dict[str, Any]]:
    """Yield new entries as events (see control/events.py), without end. Failed if the reader is too slow."""
    waiting: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def take(entry: dict[str, Any]) -> None:
        if waiting.qsize() < _MOST_WAITING:
            waiting.put_nowait(entry)
        else:
            log.watchers.discard(take)
            waiting.put_nowait(None)

    log.watchers.add(take)
    try:
        while True:
            entry = await waiting.get()
            if entry is None:
                raise Failed("this connection reads the entries too slowly", "see `insula audit`")
            moment = datetime.fromisoformat(entry["time"]).timestamp()
            story = {"time": moment, "revision": None, "kind": "request", "action": entry["verb"]}
            yield {**entry, **story}
    finally:
        log.watchers.discard(take)
