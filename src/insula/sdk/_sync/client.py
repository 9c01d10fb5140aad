"""`Insula`: a client of one daemon."""

from __future__ import annotations

from collections.abc import Callable

from insula.client import remotes, sessions
from insula.sdk._sync.calls import Caller
from insula.sdk._sync.declared import DeclaredOperations
from insula.sdk._sync.endpoints import ServiceEndpointOperations
from insula.sdk._sync.floating_ips import FloatingIpOperations
from insula.sdk._sync.guarantees import GuaranteeOperations
from insula.sdk._sync.host import AuditOperations, HostOperations
from insula.sdk._sync.http import HTTPSTransport, UnixTransport
from insula.sdk._sync.identities import IdentityOperations
from insula.sdk._sync.images import ImageOperations
from insula.sdk._sync.instances import InstanceOperations
from insula.sdk._sync.load_balancers import LoadBalancerOperations
from insula.sdk._sync.networks import NetworkOperations
from insula.sdk._sync.peerings import PeeringOperations
from insula.sdk._sync.policies import (
    AddressGroupOperations,
    OperatorPolicyOperations,
    PolicyOperations,
)
from insula.sdk._sync.routers import RouterOperations
from insula.sdk._sync.snapshots import SnapshotOperations
from insula.sdk._sync.tenants import TenantOperations
from insula.sdk._sync.transport import Transport


class Insula:
    """A client of one Insula daemon, by default of that of this machine.

    `transport` says how it is reached. `token` proves who sends the requests; a function is asked for it at each
    request. Without a token it is the user of this process, or the holder of the transport's certificate.

    A client may be used by several tasks, or threads, at once.
    """

    def __init__(self, transport: Transport | None = None, *, token: str | Callable[[], str] | None = None) -> None:
        self.transport: Transport = transport or UnixTransport()
        caller = Caller(self.transport, token)
        self.tenants = TenantOperations(caller)
        self.networks = NetworkOperations(caller)
        self.guarantees = GuaranteeOperations(caller)
        self.policies = PolicyOperations(caller)
        self.address_groups = AddressGroupOperations(caller)
        self.operator_policies = OperatorPolicyOperations(caller)
        self.routers = RouterOperations(caller)
        self.peerings = PeeringOperations(caller)
        self.endpoints = ServiceEndpointOperations(caller)
        self.floating_ips = FloatingIpOperations(caller)
        self.load_balancers = LoadBalancerOperations(caller)
        self.images = ImageOperations(caller)
        self.instances = InstanceOperations(caller)
        self.snapshots = SnapshotOperations(caller)
        self.identities = IdentityOperations(caller)
        self.host = HostOperations(caller)
        self.audit = AuditOperations(caller)
        self.declared = DeclaredOperations(caller)

    @classmethod
    def remote(cls, name: str, *, timeout: float | None = None) -> Insula:
        """Return a client of a remote that the command line has joined (`insula remote add`, `insula login`). A login
        is refreshed when it ends. NotFound, Denied if others can read its token.

        `timeout` is in seconds, for each step of a request; None is no timeout.
        """
        found = remotes.load(name)
        certificate = found.get("certificate")
        transport = HTTPSTransport(
            found["addresses"], authority=found["authority"], certificate=certificate, timeout=timeout
        )
        if "login" in found:
            return cls(transport, token=lambda: sessions.token_of(name, found))
        return cls(transport, token=None if certificate else found.get("token"))

    def __enter__(self) -> Insula:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections that are not in use."""
        self.transport.close()
