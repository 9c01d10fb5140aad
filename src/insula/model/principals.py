"""Principals, bindings and tokens: the stored objects, the requests and the responses.

A *principal* is a user (a person) or a service account (a program) of a tenant. Its `id` is its identity: a principal
that is removed and created again under the same name is another one, and inherits nothing. A *binding* gives a
principal a role, in one tenant or on the host. A *token* authenticates its bearer as its owner.
"""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from insula.model import fields
from insula.model.objects import Struct
from insula.model.permissions import Role

MAX_TTL = 366 * 86400
"""The longest life of a token in seconds. Every token has an end."""
DEFAULT_TTL = 30 * 86400
MAX_CERTIFICATE_TTL = 90 * 86400
"""The longest life of a client's certificate in seconds, which is also the default."""
JOIN_TTL = 15 * 60
"""The life of an invitation in seconds."""


PrincipalKind = Literal["user", "service-account", "group"]


class Principal(Struct, kw_only=True):
    """A user, a service account of `tenant`, or a group of users at a provider of OpenID Connect.

    `uid` is the user ID of a user on the host, for the users' socket. A user with `issuer` and `subject` is who has
    these in a token. A group has `issuer` without a subject, and is named PROVIDER:GROUP.
    """

    id: str
    name: str
    tenant: str | None = None
    uid: int | None = None
    issuer: str | None = None
    subject: str | None = None
    created: float

    @property
    def kind(self) -> PrincipalKind:
        if self.tenant is not None:
            return "service-account"
        return "group" if self.issuer is not None and self.subject is None else "user"

    @property
    def label(self) -> str:
        """The name for people: that of a service account has its tenant in front."""
        return self.name if self.tenant is None else f"{self.tenant}/{self.name}"


class Binding(Struct, kw_only=True):
    """A principal's role in a tenant; on the host if that is None. `by` is the ID of the principal that made it."""

    principal: str
    tenant: str | None
    role: Role
    by: str | None = None
    created: float


class Token(Struct, kw_only=True):
    """A token as it is stored: `digest` is the SHA-256 of the secret in hex. With `labels` it is valid only for
    instances that have them all."""

    id: str
    principal: str
    digest: str
    description: str = ""
    labels: dict[str, str] = {}
    exchanged_for: float | None = None  # it is good for one exchange, for a token that lives so many seconds
    created: float
    expires: float


class Certificate(Struct, kw_only=True):
    """A client's certificate as it is stored, by its serial number in hex."""

    serial: str
    principal: str
    created: float
    expires: float

    @property
    def id(self) -> str:
        return self.serial


# -- requests ------------------------------------------------------------------------------------------------------


class UserSpec(Struct, kw_only=True):
    """The request of `insula user create`. `subject` is the one in tokens of `provider`, by its name in the settings;
    the only provider can be left out."""

    name: fields.Label
    uid: Annotated[int, msgspec.Meta(ge=1, le=0xFFFFFFFE)] | None = None
    provider: fields.Label | None = None
    subject: fields.Subject | None = None


class ServiceAccountSpec(Struct, kw_only=True):
    """The request of `insula user create --service-account`."""

    name: fields.Label


class BindingSpec(Struct, kw_only=True):
    """The request of `insula user bind`; `user` is a name, TENANT/NAME of a service account, or PROVIDER:GROUP."""

    user: fields.BoundName
    role: Role


class TokenSpec(Struct, kw_only=True):
    """The request of `insula token create`. `user` is a name, or TENANT/NAME of a service account; None is oneself."""

    user: fields.PrincipalName | None = None
    ttl: Annotated[float, msgspec.Meta(gt=0, le=MAX_TTL)] = DEFAULT_TTL
    description: Annotated[str, msgspec.Meta(max_length=256)] = ""
    labels: fields.Labels = {}


class JoinSpec(Struct, kw_only=True):
    """The request of `insula remote invite`; `ttl` is that of the token that the invitation is exchanged for."""

    user: fields.PrincipalName
    ttl: Annotated[float, msgspec.Meta(gt=0, le=MAX_TTL)] = DEFAULT_TTL


class CertificateSpec(Struct, kw_only=True):
    """The request of `insula certificate create`."""

    user: fields.PrincipalName | None = None
    ttl: Annotated[float, msgspec.Meta(gt=0, le=MAX_CERTIFICATE_TTL)] = MAX_CERTIFICATE_TTL


# -- responses -----------------------------------------------------------------------------------------------------


class BindingView(Struct, kw_only=True):
    user: str
    kind: PrincipalKind
    tenant: str | None
    role: Role
    created: float


class PrincipalView(Struct, kw_only=True):
    principal: Principal
    bindings: list[BindingView] = []


class TokenView(Struct, kw_only=True):
    """A token without its secret."""

    id: str
    user: str
    description: str
    labels: dict[str, str]
    created: float
    expires: float


class TokenCreated(Struct, kw_only=True):
    """A new token. `token` is shown once: only its digest is stored."""

    id: str
    token: str
    expires: float


class CertificateView(Struct, kw_only=True):
    serial: str
    user: str
    created: float
    expires: float


class CertificateCreated(Struct, kw_only=True):
    """A new certificate with its key, as PEM. The key is shown once, and stored nowhere."""

    serial: str
    pem: str
    expires: float


class Invitation(Struct, kw_only=True):
    """What somebody needs to reach this host for the first time: addresses, the certificate of the authority that
    signs the server's (PEM), and a token that is good for one exchange."""

    addresses: list[str]
    authority: str
    token: str
    expires: float


class Authorities(Struct, kw_only=True):
    """The authorities by which clients know this host (PEM), the newest first; empty if HTTPS is off."""

    server: str


class LoginProvider(Struct, kw_only=True):
    """A provider of OpenID Connect, as a client needs it. `authority` are certificates that it is trusted by (PEM);
    empty: those of the client's system. `audience` is what access tokens are asked for; empty: ID tokens are used."""

    name: str
    issuer: str
    client_id: str
    audience: str
    scopes: list[str]
    authority: str = ""


class LoginInfo(Struct, kw_only=True):
    """How to log in to this host. `authority` is the certificate of the authority of its HTTPS (PEM); who trusts it
    must know its fingerprint."""

    authority: str
    providers: list[LoginProvider] = []


class WhoAmI(Struct, kw_only=True):
    """The caller: its name, the proof, and its roles by tenant. `host` are its roles on the host. `display` is the name
    that a provider of OpenID Connect gives it."""

    user: str
    display: str = ""
    id: str | None
    proof: str
    host: list[Role] = []
    tenants: dict[str, Role] = {}
    labels: dict[str, str] = {}
    expires: float | None = None
