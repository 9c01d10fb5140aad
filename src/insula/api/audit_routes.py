"""/v1/audit: the audit log, its bytes and its head for verification elsewhere, and new keys for that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any, TypeVar

from litestar import Controller, Request, get, post
from litestar.response import Stream

from insula.api.outbox import Outbox
from insula.api.parameters import OptionalTenant, Sender, Since, Uid
from insula.api.streams import NDJSON, json_lines, primed
from insula.audit.keys import VerificationKey
from insula.audit.reader import read, read_raw
from insula.audit.writer import AuditLog
from insula.model.errors import Unavailable
from insula.model.views import AuditHead, AuditKey

T = TypeVar("T")
_ENTRIES = 200  # that are read at a time


class AuditRoutes(Controller):
    path = "/audit"
    tags = ("host",)

    @get(
        summary="The audit log, oldest first, one JSON object a line",
        permission="audit.read",
        quota="streams",
        sends=NDJSON,
        line="AuditEntry",
    )
    async def audit(
        self,
        request: Request[Any, Any, Any],
        sender: Sender,
        since: Since = None,
        uid: Uid = None,
        tenant: OptionalTenant = None,
    ) -> Stream:
        log = log_of(request)
        await asyncio.to_thread(log.flush)
        entries = read(log.path, log.files, since=since, uid=uid, tenant=tenant)
        return json_lines(await primed(_in_threads(entries, _ENTRIES)), sender)

    @get(
        "/raw",
        summary="The bytes of the audit log's files, oldest first, to be verified",
        permission="audit.read",
        quota="streams",
        sends=NDJSON,
        line="AuditEntry",
    )
    async def raw(self, request: Request[Any, Any, Any]) -> Stream:
        log = log_of(request)
        await asyncio.to_thread(log.flush)
        return Stream(await primed(_in_threads(read_raw(log.path, log.files), 1)), media_type=NDJSON)

    @get("/head", summary="Number and hash of the last line that is on the disk", permission="audit.read")
    async def head(self, request: Request[Any, Any, Any]) -> AuditHead:
        """`stored` is the last one that the store has, which was committed with a change."""
        log, outbox = log_of(request), request.app.state.outbox
        await asyncio.to_thread(log.flush)
        stored = await outbox.stored_head() if isinstance(outbox, Outbox) else None
        return AuditHead(head=str(log.head), stored=str(stored) if stored and stored.seq else None)

    @post(
        "/key",
        summary="Begin with a new key, and show the one that verifies",
        permission="audit.key",
        secret=True,
    )
    async def new_key(self, request: Request[Any, Any, Any], sender: Sender) -> AuditKey:
        """The answer is all there is of it: this host keeps only keys of later lines."""
        log, loop = log_of(request), asyncio.get_running_loop()
        done: asyncio.Future[VerificationKey | OSError] = loop.create_future()

        def told(result: VerificationKey | OSError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_settle, done, result)

        log.new_key({"user": sender.name}, told)
        result = await done
        if isinstance(result, OSError):
            raise Unavailable(f"the audit log can't be written: {result.strerror}", "make room on its disk")
        return AuditKey(key=str(result))


def _settle(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def log_of(request: Request[Any, Any, Any]) -> AuditLog:
    """Return the audit log. Unavailable if this daemon has none."""
    log: AuditLog | None = request.app.state.audit
    if log is None:
        raise Unavailable("this daemon has no audit log", "see insulad.toml(5)")
    return log


async def _in_threads(items: Iterator[T], many: int) -> AsyncIterator[T]:
    """Yield items that are read from files, `many` at a time, in a thread."""
    while batch := await asyncio.to_thread(lambda: list(islice(items, many))):
        for item in batch:
            yield item
