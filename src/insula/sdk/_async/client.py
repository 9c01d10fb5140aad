"""`AsyncInsula`: a client of one daemon."""

from __future__ import annotations

from collections.abc import Callable

from insula.client import remotes, sessions
from insula.sdk._async.calls import AsyncCaller
from insula.sdk._async.declared import AsyncDeclaredOperations
from insula.sdk._async.endpoints import AsyncServiceEndpointOperations
from insula.sdk._async.floating_ips import AsyncFloatingIpOperations
from insula.sdk._async.guarantees import AsyncGuaranteeOperations
from insula.sdk._async.host import AsyncAuditOperations, AsyncHostOperations
from insula.sdk._async.http import AsyncHTTPSTransport, AsyncUnixTransport
from insula.sdk._async.identities import AsyncIdentityOperations
from insula.sdk._async.images import AsyncImageOperations
from insula.sdk._async.instances import AsyncInstanceOperations
from insula.sdk._async.load_balancers import AsyncLoadBalancerOperations
from insula.sdk._async.networks import AsyncNetworkOperations
from insula.sdk._async.peerings import AsyncPeeringOperations
from insula.sdk._async.policies import (
    AsyncAddressGroupOperations,
    AsyncOperatorPolicyOperations,
    AsyncPolicyOperations,
)
from insula.sdk._async.routers import AsyncRouterOperations
from insula.sdk._async.snapshots import AsyncSnapshotOperations
from insula.sdk._async.tenants import AsyncTenantOperations
from insula.sdk._async.transport import AsyncTransport


class AsyncInsula:
    """A client of one Insula daemon, by default of that of this machine.

    `transport` says how it is reached. `token` proves who sends the requests; a function is asked for it at each
    request. Without a token it is the user of this process, or the holder of the transport's certificate.

    A client may be used by several tasks, or threads, at once.
    """

    def __init__(
        self, transport: AsyncTransport | None = None, *, token: str | Callable[[], str] | None = None
    ) -> None:
        self.transport: AsyncTransport = transport or AsyncUnixTransport()
        caller = AsyncCaller(self.transport, token)
        self.tenants = AsyncTenantOperations(caller)
        self.networks = AsyncNetworkOperations(caller)
        self.guarantees = AsyncGuaranteeOperations(caller)
        self.policies = AsyncPolicyOperations(caller)
        self.address_groups = AsyncAddressGroupOperations(caller)
        self.operator_policies = AsyncOperatorPolicyOperations(caller)
        self.routers = AsyncRouterOperations(caller)
        self.peerings = AsyncPeeringOperations(caller)
        self.endpoints = AsyncServiceEndpointOperations(caller)
        self.floating_ips = AsyncFloatingIpOperations(caller)
        self.load_balancers = AsyncLoadBalancerOperations(caller)
        self.images = AsyncImageOperations(caller)
        self.instances = AsyncInstanceOperations(caller)
        self.snapshots = AsyncSnapshotOperations(caller)
        self.identities = AsyncIdentityOperations(caller)
        self.host = AsyncHostOperations(caller)
        self.audit = AsyncAuditOperations(caller)
        self.declared = AsyncDeclaredOperations(caller)

    @classmethod
    def remote(cls, name: str, *, timeout: float | None = None) -> AsyncInsula:
        """Return a client of a remote that the command line has joined (`insula remote add`, `insula login`). A login
        is refreshed when it ends. NotFound, Denied if others can read its token.

        `timeout` is in seconds, for each step of a request; None is no timeout.
        """
        found = remotes.load(name)
        certificate = found.get("certificate")
        transport = AsyncHTTPSTransport(
            found["addresses"], authority=found["authority"], certificate=certificate, timeout=timeout
        )
        if "login" in found:
            return cls(transport, token=lambda: sessions.token_of(name, found))
        return cls(transport, token=None if certificate else found.get("token"))

    async def __aenter__(self) -> AsyncInsula:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections that are not in use."""
        await self.transport.aclose()
