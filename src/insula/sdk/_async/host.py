"""`AsyncHostOperations` and `AsyncAuditOperations`: the host, its events, and its audit log."""

from __future__ import annotations

from collections.abc import Sequence

from insula.model.accounting import TenantUsage
from insula.model.views import AuditHead, AuditKey, Check, HostStatus, StatsSample, VerifyReport, WhoIs
from insula.sdk import answers, decoding
from insula.sdk._async.calls import AsyncCaller, request
from insula.sdk._async.items import AsyncItems, as_sent, lines
from insula.sdk.types import AuditEntry, EventView


class AsyncHostOperations:
    """The host, and what is about all tenants that one may see."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def status(self) -> HostStatus:
        return await self._caller.get(answers.HOST_STATUS, "status")

    async def doctor(self) -> Sequence[Check]:
        """Return the requirements of the host, and the consequences of missing ones."""
        return await self._caller.get(answers.CHECKS, "doctor")

    async def verify(self) -> VerifyReport:
        """Compare wanted, installed and measured reachability."""
        return await self._caller.get(answers.VERIFY_REPORT, "verify")

    async def repair(self, *, idempotency_key: str | None = None) -> VerifyReport:
        """Install again what differs from what tenants want, and verify."""
        return await self._caller.change(answers.VERIFY_REPORT, "POST", "verify", "repair", key=idempotency_key)

    async def whois(self, pid: int) -> WhoIs:
        """Return which tenant and instance a process of the host belongs to."""
        return await self._caller.get(answers.WHO_IS, "whois", str(pid))

    async def metrics(self) -> str:
        """Return the metrics of the host and of all tenants, in the text format of Prometheus."""
        return await self._caller.text("/metrics")

    async def usage(self, *, since: float | None = None, removed: bool = False) -> Sequence[TenantUsage]:
        """Return what tenants have used since a time (seconds since the epoch), without their instances; with `removed`
        those that were removed since then."""
        query = {"since": since, "removed": removed}
        return await self._caller.get(answers.TENANT_USAGES, "usage", query=query)

    def stats(self, *, interval: float | None = None) -> AsyncItems[StatsSample]:
        """Yield the usage of all running instances: once, or every `interval` seconds."""
        sent = request("GET", "stats", query={"interval": interval})
        return AsyncItems(self._caller, sent, lines(answers.STATS_SAMPLE))

    def events(
        self,
        *,
        cursor: str | None = None,
        from_revision: int | None = None,
        audit: bool = False,
        verify: bool = False,
    ) -> AsyncItems[EventView]:
        """Yield changes as they happen: from now on, after the event with this `cursor`, or after a revision of the
        store; with `audit` also entries of the audit log. With `verify` isolation is proven as long as it is read."""
        query = {"cursor": cursor, "from_revision": from_revision, "audit": audit, "verify": verify}
        return AsyncItems(self._caller, request("GET", "events", query=query), lines(decoding.event))

    async def down(self, *, idempotency_key: str | None = None) -> None:
        """Stop all instances, clean the host, and end insulad; the state is kept."""
        await self._caller.do("POST", "down", key=idempotency_key)


class AsyncAuditOperations:
    """The audit log."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    def list(
        self, *, since: float | None = None, uid: int | None = None, tenant: str | None = None
    ) -> AsyncItems[AuditEntry]:
        """Yield the entries, oldest first: since a time (seconds since the epoch), of a user of the host, about a
        tenant."""
        sent = request("GET", "audit", query={"since": since, "uid": uid, "tenant": tenant})
        return AsyncItems(self._caller, sent, lines(decoding.entry))

    def raw(self) -> AsyncItems[bytes]:
        """Yield the bytes of the log's files, oldest first, to be verified."""
        return AsyncItems(self._caller, request("GET", "audit", "raw"), as_sent)

    async def head(self) -> AuditHead:
        """Return number and hash of the last line, and those that the store has."""
        return await self._caller.get(answers.AUDIT_HEAD, "audit", "head")

    async def new_key(self, *, idempotency_key: str | None = None) -> AuditKey:
        """Begin with a new key; returns the one that verifies lines from now on, which is kept nowhere."""
        return await self._caller.change(answers.AUDIT_KEY, "POST", "audit", "key", key=idempotency_key)
