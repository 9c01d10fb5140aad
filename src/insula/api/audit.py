"""Entries of the audit log for requests: the user, the request, the tenant, and the result.

Recorded are requests that change something, and those that read an instance's own data: exec, attach, logs, archive,
export. Bodies are not recorded, except names, because commands, variables and passwords may be secret.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from litestar.types import Message, Scope

from insula.api.peer import Peer
from insula.api.tls.record import ClientRecord
from insula.audit import AuditLog, timestamp
from insula.control.identities.authority import NOBODY, Authority
from insula.model.errors import Failed, InsulaError

_READS_DATA = ("/logs", "/archive", "/export")
_CHANGES_NOTHING = ("/wait",)
_AT_THE_BEGINNING = ("/exec", "/attach", "/run", *_READS_DATA)  # requests that may last for days
_MOST_WAITING = 10_000  # entries in the queue of one watcher
_LONGEST = 256  # characters of a name
_SECRET = re.compile(r"^[^/]*@(?=[^/]*/)")  # user and password before a registry's name
_current: ContextVar[AuditedRequest | None] = ContextVar("request", default=None)


def note(**details: object) -> None:
    """Add a field, such as `name` or `error`, to the entry of the current request."""
    request = _current.get()
    if request is not None:
        request.details.update({key: value for key, value in details.items() if value is not None})


def without_secret(reference: str) -> str:
    """Return a reference to an image without a user's name and password."""
    return _SECRET.sub("", reference)


class AuditedRequest:
    """The entry of a running request. It is written once: before the last piece of the response is sent, or before the
    first one of requests that may last for days."""

    def __init__(self, log: AuditLog | None, scope: Scope, peer: Peer | None, socket: str) -> None:
        self.id = os.urandom(8).hex()
        self.details: dict[str, object] = {}
        self.authority: Authority = NOBODY
        self._log = log
        self._scope: Any = scope
        self._peer = peer
        self._socket = socket
        self._begun = time.time()
        self._status: int | None = None
        _current.set(self)

    def sending(self, message: Message) -> None:
        """Record that a part of the response is about to be sent."""
        if self._log is None:
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if self._template().endswith(_AT_THE_BEGINNING):
                self.write()
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self.write()

    def refused(self, error: InsulaError) -> None:
        """Record a request of a client that may not use the daemon."""
        self._status = error.status
        self.details["error"] = type(error).__name__
        self.write(always=True)

    def throttled(self, error: InsulaError) -> None:
        """Record a request that was refused because there were too many, if its kind is recorded."""
        self._status = error.status
        self.details["error"] = type(error).__name__
        self.write()

    def write(self, *, always: bool = False) -> None:
        """Write the entry, unless it was written or this kind of request is not recorded."""
        log, self._log = self._log, None
        if log is None or not (always or self._is_recorded()):
            return
        parameters = self._scope.get("path_params") or {}
        name = parameters.get("name") or parameters.get("network")
        tenant = parameters.get("tenant")
        details = dict(self.details)
        if "tenant" in details:
            tenant = details.pop("tenant")
        name = details.pop("name", None) or (name and str(name).lstrip("/"))
        log.record(
            {
                "time": timestamp(self._begun),
                "id": self.id,
                "user": self.authority.name,
                "proof": self.authority.proof,
                **self._source(),
                "verb": f"{self._scope['method']} {self._template() or self._scope['path']}"[:_LONGEST],
                "tenant": tenant and str(tenant)[:_LONGEST],
                "name": name and str(name)[:_LONGEST],
                "status": self._status,
                "ms": round((time.time() - self._begun) * 1000, 1),
                **{key: str(value)[:_LONGEST] for key, value in details.items()},
            }
        )

    def _source(self) -> dict[str, object]:
        """Where the request comes from: an address of the network, or a process of the host."""
        client: ClientRecord | None = self._scope["state"].get("client")
        if client is not None:
            return {"uid": None, "gid": None, "pid": None, "address": client.address, "port": client.port}
        if self._peer is None:
            return {"uid": None, "gid": None, "pid": None, "socket": self._socket}
        return {"uid": self._peer.uid, "gid": self._peer.gid, "pid": self._peer.pid, "socket": self._socket}

    @property
    def sender(self) -> str:
        """The sender, for the log."""
        shown = ("uid", "pid", "address")
        source = {name: value for name, value in self._source().items() if value is not None and name in shown}
        return " ".join([f"user={self.authority.name}", *(f"{name}={value}" for name, value in source.items())])

    def _template(self) -> str:
        """Return the route, as in ``/v1/tenants/{tenant}/instances``; empty if there is none for this path."""
        return str(self._scope.get("path_template") or "").replace(":str}", "}").replace(":path}", "}")

    def _is_recorded(self) -> bool:
        template = self._template() or self._scope["path"]
        if self._scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return template.endswith(_READS_DATA) and "/instances/" in template
        return not template.endswith(_CHANGES_NOTHING)


def record_event(log: AuditLog, event: dict[str, Any]) -> None:
    """Record what the gate of HTTPS tells: a handshake that failed, from where and why."""
    moment = timestamp(float(event.get("time") or time.time()))
    entry = {"user": "nobody", "proof": "none", "verb": "TLS handshake", "tenant": None, "name": None, "status": 401}
    details: dict[str, Any] = {key: str(event[key])[:_LONGEST] for key in ("address", "error") if key in event}
    log.record({"time": moment, "id": os.urandom(8).hex(), **entry, "ms": 0.0, **details})


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
