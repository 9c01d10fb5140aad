"""`Authority`: the rights of one request, and how its sender was authenticated.

It is computed for each request, from the roles that the principal has now. A token gives the permissions that its
owner has at that moment, except those that no token gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from insula.control.identities.claims import OidcClaims
from insula.model.errors import Denied, NotFound
from insula.model.permissions import (
    BY_ANYBODY,
    BY_INVITATION,
    NOT_BY_TOKEN,
    OF_EVERYBODY,
    PERMISSIONS,
    Role,
    permissions_of,
)
from insula.model.principals import Principal

_NOTHING: frozenset[str] = frozenset()
_WITH_LABELS = ("self.read", "tenant.read", "network.read", "image.read")
"""What a token for some instances gives beside their permissions: what it takes to run one."""


@dataclass(frozen=True)
class Authority:
    """The rights of a request. `principal` is None for the local operator: root, or a member of the group `insula`.

    `proof` says how it is known: "socket", "uid N", "token ID", "certificate SERIAL" or "oidc PROVIDER". `host` are its
    roles on the host, `tenants` its roles by tenant. `claims` are those of a token of a provider of OpenID Connect, and
    `groups` the IDs of its groups that have roles. `invited`: the token is an invitation, and good for its exchange
    only. With `labels` it is valid only for instances that have them all. `expires` is the end of the proof, in seconds
    since the epoch.
    """

    proof: str
    principal: Principal | None = None
    host: frozenset[Role] = frozenset()
    tenants: Mapping[str, Role] = field(default_factory=dict)
    token: str | None = None
    certificate: str | None = None
    claims: OidcClaims | None = None
    groups: frozenset[str] = frozenset()
    invited: bool = False
    anonymous: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    expires: float | None = None

    @property
    def name(self) -> str:
        if self.principal:
            return self.principal.label
        return "operator" if self.host else "nobody"

    @property
    def by_bearer(self) -> bool:
        """Whether the proof is a token, which could have been stolen."""
        return self.token is not None or self.claims is not None

    @property
    def sees_host(self) -> bool:
        """Whether it may see numbers of the host and of other tenants. A token for some instances may not."""
        return bool(self.host) and not self.labels

    def sees_environment(self, tenant: str | None) -> bool:
        """Whether it may see the values of environment variables, which often are secrets: only if it could read them
        in the tenant's instances."""
        return "instance.exec" in self.held(tenant)

    def held(self, tenant: str | None = None) -> frozenset[str]:
        """Return the permissions that are held on the host and, with `tenant`, in it."""
        if self.invited:
            return BY_INVITATION
        if self.anonymous:
            return BY_ANYBODY
        held = OF_EVERYBODY.union(*map(permissions_of, self.host))
        if tenant is not None and (role := self.tenants.get(tenant)):
            held |= permissions_of(role)
        if self.labels:
            held = frozenset(name for name in held if name.startswith("instance.") or name in _WITH_LABELS)
        if tenant is None:
            held = frozenset(name for name in held if PERMISSIONS[name].scope != "tenant")
        return held - NOT_BY_TOKEN if self.by_bearer else held

    def sees(self, tenant: str) -> bool:
        """Whether it may know that this tenant exists."""
        return bool(self.host) or tenant in self.tenants

    def has_all_of(self, other: Authority) -> bool:
        """Whether it holds every role that another one has, or a higher one."""
        return self.host >= other.host and all(
            permissions_of(role) <= self.held(tenant) | NOT_BY_TOKEN for tenant, role in other.tenants.items()
        )

    def check(self, permission: str, tenant: str | None = None) -> None:
        """Raise NotFound for a tenant that it may not know of, as for one that does not exist; else Denied unless the
        permission is held."""
        scope = PERMISSIONS[permission].scope
        if tenant is not None and not self.sees(tenant):
            raise no_tenant(tenant)
        if permission not in self.held(tenant if scope == "tenant" else None):
            where = f" in tenant {tenant}" if scope == "tenant" else ""
            hint = "a token can't; use another proof" if self._token_hides(permission) else "ask for a role that has it"
            raise Denied(f"{self.name} may not do this{where}: it takes the permission {permission}", hint)

    def _token_hides(self, permission: str) -> bool:
        return self.by_bearer and permission in NOT_BY_TOKEN

    def covers(self, permissions: frozenset[str], tenant: str | None) -> bool:
        """Whether all of these are held; only then may they be given to others."""
        return permissions <= (self.held(tenant) if tenant is not None else self.held_everywhere())

    def held_everywhere(self) -> frozenset[str]:
        """Return the permissions of its roles on the host, with those that they hold in every tenant."""
        held = _NOTHING.union(*map(permissions_of, self.host))
        return held - NOT_BY_TOKEN if self.by_bearer else held


def no_tenant(name: str) -> NotFound:
    """Return the error for a tenant that does not exist, and for one that the caller may not know of."""
    return NotFound(f"there is no tenant {name}", "`insula tenant ls` lists them")


NOBODY = Authority(proof="none", anonymous=True)
"""The sender of a request without a proof, or whose proof is not valid."""
OPERATOR = Authority(proof="socket", host=frozenset({"operator"}))
"""The local operator."""
