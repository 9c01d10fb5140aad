"""`HostResource`: /v1/status, doctor, verify, whois, down, events and audit, and /metrics."""

from __future__ import annotations

from insula.client.http import Response, request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]


class HostResource:
    """One host: its state, its checks and its audit log."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def status(self) -> Object:
        return self.client.call("GET", "status")  # type: ignore[no-any-return]

    def doctor(self) -> Objects:
        return self.client.call("GET", "doctor")  # type: ignore[no-any-return]

    def verify(self) -> Object:
        return self.client.call("GET", "verify")  # type: ignore[no-any-return]

    def repair(self) -> Object:
        """Install again what differs from what tenants want, and verify."""
        return self.client.call("POST", "verify", "repair")  # type: ignore[no-any-return]

    def whois(self, pid: int) -> Object:
        return self.client.call("GET", "whois", str(pid))  # type: ignore[no-any-return]

    def metrics(self) -> str:
        """Return the metrics of the host and of all tenants, in the text format of Prometheus."""
        with request(self.client.remote, "GET", "/metrics", timeout=self.client.timeout) as response:
            return b"".join(response).decode()

    def down(self) -> None:
        """Stop all instances, and remove every network, mount and cgroup of Insula from the host; the state is kept."""
        self.client.call("POST", "down")

    def events(
        self, from_revision: int | None = None, *, audit: bool = False, verify: bool = False
    ) -> Iterator[Object]:
        """Yield changes as they happen; with `audit` also entries of the audit log as they are written; with `verify`
        isolation is proven meanwhile."""
        query = {"from_revision": from_revision, "audit": audit, "verify": verify}
        return self.client.lines("GET", "events", query=query)  # type: ignore[no-any-return]

    def audit(
        self, *, since: float | None = None, uid: int | None = None, tenant: str | None = None
    ) -> Iterator[Object]:
        """Yield the audit log, oldest entry first: since a time (seconds), of a user, about a tenant."""
        return self.client.lines("GET", "audit", query={"since": since, "uid": uid, "tenant": tenant})  # type: ignore[no-any-return]

    def audit_raw(self) -> Response:
        """Return a response whose body is the bytes of the audit log, oldest first, for verification."""
        return self.client.stream("GET", "audit", "raw")  # type: ignore[no-any-return]

    def audit_head(self) -> Object:
        """Return number and hash of the audit log's last line, and those that the store has."""
        return self.client.call("GET", "audit", "head")  # type: ignore[no-any-return]

    def new_audit_key(self) -> Object:
        """Begin with a new key of the audit log; returns the one that verifies it from now on, kept nowhere."""
        return self.client.call("POST", "audit", "key")  # type: ignore[no-any-return]
