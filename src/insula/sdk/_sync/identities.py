"""`IdentityOperations`: users, service accounts, roles, tokens and certificates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from insula.model.permissions import Role
from insula.model.principals import (
    DEFAULT_TTL,
    MAX_CERTIFICATE_TTL,
    Authorities,
    BindingSpec,
    BindingView,
    CertificateCreated,
    CertificateSpec,
    CertificateView,
    Invitation,
    JoinSpec,
    LoginInfo,
    PrincipalView,
    ServiceAccountSpec,
    TokenCreated,
    TokenSpec,
    TokenView,
    UserSpec,
    WhoAmI,
)
from insula.sdk import answers
from insula.sdk._sync.calls import Caller


class IdentityOperations:
    """Principals. A user is named NAME, a service account TENANT/NAME, a group PROVIDER:GROUP. Secrets in answers are
    shown once: such a request that is sent again with its idempotency key is a Conflict."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def whoami(self) -> WhoAmI:
        """Return the sender of this request, and its roles."""
        return self._caller.get(answers.WHO_AM_I, "whoami")

    # -- users and service accounts ------------------------------------------------------------------------------------

    def list_users(self, *, prefix: str | None = None, page: int | None = None) -> Iterator[PrincipalView]:
        return self._caller.pages(answers.PRINCIPALS, "users", query={"prefix": prefix}, page=page)

    def create_user(
        self,
        name: str,
        *,
        uid: int | None = None,
        provider: str | None = None,
        subject: str | None = None,
        idempotency_key: str | None = None,
    ) -> PrincipalView:
        """Create a user. `uid` is the user of the host that it is, `subject` who it is at a provider of OpenID
        Connect."""
        spec = UserSpec(name=name, uid=uid, provider=provider, subject=subject)
        return self._caller.change(answers.PRINCIPAL, "POST", "users", body=spec, key=idempotency_key)

    def get_user(self, name: str) -> PrincipalView:
        return self._caller.get(answers.PRINCIPAL, "users", name)

    def remove_user(self, name: str, *, idempotency_key: str | None = None) -> None:
        """Remove a user, its roles and tokens."""
        self._caller.do("DELETE", "users", name, key=idempotency_key)

    def list_service_accounts(
        self, tenant: str, *, prefix: str | None = None, page: int | None = None
    ) -> Iterator[PrincipalView]:
        where = ("tenants", tenant, "service-accounts")
        return self._caller.pages(answers.PRINCIPALS, *where, query={"prefix": prefix}, page=page)

    def create_service_account(self, tenant: str, name: str, *, idempotency_key: str | None = None) -> PrincipalView:
        where = ("tenants", tenant, "service-accounts")
        spec = ServiceAccountSpec(name=name)
        return self._caller.change(answers.PRINCIPAL, "POST", *where, body=spec, key=idempotency_key)

    def remove_service_account(self, tenant: str, name: str, *, idempotency_key: str | None = None) -> None:
        """Remove a service account, its role and tokens."""
        self._caller.do("DELETE", "tenants", tenant, "service-accounts", name, key=idempotency_key)

    # -- roles ---------------------------------------------------------------------------------------------------------

    def list_bindings(
        self, tenant: str | None = None, *, prefix: str | None = None, page: int | None = None
    ) -> Iterator[BindingView]:
        """Yield who has which role in a tenant; on the host for None."""
        return self._caller.pages(answers.BINDINGS, *_bindings(tenant), query={"prefix": prefix}, page=page)

    def bind(
        self, user: str, role: Role, tenant: str | None = None, *, idempotency_key: str | None = None
    ) -> BindingView:
        """Give a principal a role in a tenant (None: on the host), instead of the one that it has there."""
        spec = BindingSpec(user=user, role=role)
        return self._caller.change(answers.BINDING, "PUT", *_bindings(tenant), body=spec, key=idempotency_key)

    def unbind(self, user: str, tenant: str | None = None, *, idempotency_key: str | None = None) -> None:
        """Take the role of a principal in a tenant, or on the host."""
        self._caller.do("DELETE", *_bindings(tenant), query={"user": user}, key=idempotency_key)

    # -- tokens and certificates ---------------------------------------------------------------------------------------

    def list_tokens(
        self, *, everybody: bool = False, prefix: str | None = None, page: int | None = None
    ) -> Iterator[TokenView]:
        """Yield one's own tokens, or those of everybody."""
        query = {"all": everybody, "prefix": prefix}
        return self._caller.pages(answers.TOKENS, "tokens", query=query, page=page)

    def create_token(
        self,
        user: str | None = None,
        *,
        ttl: float = DEFAULT_TTL,
        description: str = "",
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> TokenCreated:
        """Make a token for oneself or for `user`, which lives `ttl` seconds. With `labels` it is for instances that
        have them all."""
        spec = TokenSpec(user=user, ttl=ttl, description=description, labels=dict(labels or {}))
        return self._caller.change(answers.TOKEN_CREATED, "POST", "tokens", body=spec, key=idempotency_key)

    def revoke_token(self, token_id: str, *, idempotency_key: str | None = None) -> None:
        self._caller.do("DELETE", "tokens", token_id, key=idempotency_key)

    def list_certificates(
        self, *, everybody: bool = False, prefix: str | None = None, page: int | None = None
    ) -> Iterator[CertificateView]:
        """Yield one's own certificates, or those of everybody."""
        query = {"all": everybody, "prefix": prefix}
        return self._caller.pages(answers.CERTIFICATES, "certificates", query=query, page=page)

    def create_certificate(
        self, user: str | None = None, *, ttl: float = MAX_CERTIFICATE_TTL, idempotency_key: str | None = None
    ) -> CertificateCreated:
        """Make a key with a certificate for oneself or for `user`, which lives `ttl` seconds."""
        spec = CertificateSpec(user=user, ttl=ttl)
        return self._caller.change(answers.CERTIFICATE_CREATED, "POST", "certificates", body=spec, key=idempotency_key)

    def revoke_certificate(self, serial: str, *, idempotency_key: str | None = None) -> None:
        self._caller.do("DELETE", "certificates", serial, key=idempotency_key)

    # -- reaching a host -----------------------------------------------------------------------------------------------

    def authorities(self) -> Authorities:
        """Return the certificates by which clients know this host."""
        return self._caller.get(answers.AUTHORITIES, "authorities")

    def rotate_authority(
        self, kind: Literal["server", "client"], *, now: bool = False, idempotency_key: str | None = None
    ) -> Authorities:
        """Replace the authority of the server or of clients; `now`: the one before is not trusted any more."""
        where = ("authorities", kind, "rotate")
        query = {"now": now}
        return self._caller.change(answers.AUTHORITIES, "POST", *where, query=query, key=idempotency_key)

    def invite(self, user: str, *, ttl: float = DEFAULT_TTL, idempotency_key: str | None = None) -> Invitation:
        """Invite a user to reach this host by HTTPS; the token that it gets lives `ttl` seconds."""
        spec = JoinSpec(user=user, ttl=ttl)
        return self._caller.change(answers.INVITATION, "POST", "invitations", body=spec, key=idempotency_key)

    def join(self, *, idempotency_key: str | None = None) -> TokenCreated:
        """Exchange an invitation, whose token this client has, for a token."""
        return self._caller.change(answers.TOKEN_CREATED, "POST", "join", key=idempotency_key)

    def login(self) -> LoginInfo:
        """Return by which providers of OpenID Connect to log in; it takes no proof."""
        return self._caller.get(answers.LOGIN, "login")


def _bindings(tenant: str | None) -> tuple[str, ...]:
    return ("bindings",) if tenant is None else ("tenants", tenant, "bindings")
