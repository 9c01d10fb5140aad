"""`client.identities`: users, service accounts, bindings of roles, tokens and certificates."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]
    Objects = list[Object]


class IdentitiesResource:
    """Users, service accounts, their roles and tokens. A principal is named NAME, a service account TENANT/NAME."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def whoami(self) -> Object:
        """Return the sender of this request, and its roles."""
        return self.client.call("GET", "whoami")  # type: ignore[no-any-return]

    def create_user(self, name: str, uid: int | None = None, **oidc: str | None) -> Object:
        """Create a user; `uid` is the user of the host that it is. `oidc`: who it is at a provider of OpenID Connect,
        `provider` and `subject`."""
        return self.client.call("POST", "users", body={"name": name, "uid": uid, **oidc})  # type: ignore[no-any-return]

    def users(self) -> Objects:
        return self.client.call("GET", "users")  # type: ignore[no-any-return]

    def user(self, name: str) -> Object:
        return self.client.call("GET", "users", name)  # type: ignore[no-any-return]

    def remove_user(self, name: str) -> None:
        self.client.call("DELETE", "users", name)

    def create_service_account(self, tenant: str, name: str) -> Object:
        return self.client.call("POST", "tenants", tenant, "service-accounts", body={"name": name})  # type: ignore[no-any-return]

    def service_accounts(self, tenant: str) -> Objects:
        return self.client.call("GET", "tenants", tenant, "service-accounts")  # type: ignore[no-any-return]

    def remove_service_account(self, tenant: str, name: str) -> None:
        self.client.call("DELETE", "tenants", tenant, "service-accounts", name)

    def bindings(self, tenant: str | None = None) -> Objects:
        """Return the bindings of roles in a tenant; on the host for None."""
        return self.client.call("GET", *_bindings(tenant))  # type: ignore[no-any-return]

    def bind(self, user: str, role: str, tenant: str | None = None) -> Object:
        """Give a principal a role in a tenant (None: on the host), instead of the one that it has there."""
        return self.client.call("PUT", *_bindings(tenant), body={"user": user, "role": role})  # type: ignore[no-any-return]

    def unbind(self, user: str, tenant: str | None = None) -> None:
        self.client.call("DELETE", *_bindings(tenant), query={"user": user})

    def create_token(self, user: str | None = None, **options: object) -> Object:
        """Make a token for oneself or for `user`; returns {"id", "token", "expires"}. `options`: ttl in seconds,
        description, labels of the instances that it is for."""
        return self.client.call("POST", "tokens", body={"user": user, **options})  # type: ignore[no-any-return]

    def tokens(self, *, everybody: bool = False) -> Objects:
        return self.client.call("GET", "tokens", query={"all": everybody})  # type: ignore[no-any-return]

    def revoke_token(self, token_id: str) -> None:
        self.client.call("DELETE", "tokens", token_id)

    def create_certificate(self, user: str | None = None, **options: object) -> Object:
        """Make a key with a certificate for oneself or for `user`; returns {"serial", "pem", "expires"}. `options`: ttl
        in seconds."""
        return self.client.call("POST", "certificates", body={"user": user, **options})  # type: ignore[no-any-return]

    def certificates(self, *, everybody: bool = False) -> Objects:
        return self.client.call("GET", "certificates", query={"all": everybody})  # type: ignore[no-any-return]

    def revoke_certificate(self, serial: str) -> None:
        self.client.call("DELETE", "certificates", serial)

    def authorities(self) -> Object:
        """Return the certificates by which clients know this host: {"server": PEM}."""
        return self.client.call("GET", "authorities")  # type: ignore[no-any-return]

    def rotate_authority(self, kind: str, *, now: bool = False) -> Object:
        """Replace the authority of the `server` or of `client`s; `now`: the one before is not trusted any more."""
        return self.client.call("POST", "authorities", kind, "rotate", query={"now": now})  # type: ignore[no-any-return]

    def invite(self, user: str, **options: object) -> Object:
        """Invite a user to reach this host by HTTPS; returns {"addresses", "authority", "token", "expires"}."""
        return self.client.call("POST", "invitations", body={"user": user, **options})  # type: ignore[no-any-return]

    def login(self) -> Object:
        """Return by which providers of OpenID Connect to log in; it takes no proof."""
        return self.client.call("GET", "login")  # type: ignore[no-any-return]

    def join(self) -> Object:
        """Exchange the invitation that the client has as its token; returns {"id", "token", "expires"}."""
        return self.client.call("POST", "join")  # type: ignore[no-any-return]


def _bindings(tenant: str | None) -> tuple[str, ...]:
    return ("bindings",) if tenant is None else ("tenants", tenant, "bindings")
