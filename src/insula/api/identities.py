"""/v1/whoami, users, tokens, bindings and, below tenants, service accounts and bindings."""

from __future__ import annotations

from collections.abc import Sequence

from litestar import Controller, delete, get, post, put
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.parameters import Flag, Name, Plane, Sender, Word
from insula.model.principals import (
    BindingSpec,
    BindingView,
    PrincipalView,
    ServiceAccountSpec,
    TokenCreated,
    TokenSpec,
    TokenView,
    UserSpec,
    WhoAmI,
)


@get("/whoami", tags=["identities"], summary="The sender of this request, and its roles", permission="self.read")
async def whoami(plane: Plane, sender: Sender) -> WhoAmI:
    return plane.identities.whoami(sender)


class UserRoutes(Controller):
    path = "/users"
    tags = ("identities",)

    @get(summary="List the users", permission="user.read")
    async def list_users(self, plane: Plane) -> Sequence[PrincipalView]:
        return plane.identities.list()

    @post(summary="Create a user", permission="user.write")
    async def create_user(self, plane: Plane, data: JSONBody[UserSpec]) -> PrincipalView:
        note(name=data.name)
        return await plane.identities.create_user(data.name, data.uid)

    @get("/{name:str}", summary="Show a user and its roles", permission="user.read")
    async def get_user(self, plane: Plane, name: Name) -> PrincipalView:
        return plane.identities.get(f"/{name}")

    @delete("/{name:str}", summary="Remove a user, its roles and tokens", permission="user.write")
    async def remove_user(self, plane: Plane, name: Name) -> None:
        await plane.identities.remove(f"/{name}")


class ServiceAccountRoutes(Controller):
    path = "/tenants/{tenant:str}/service-accounts"
    tags = ("identities",)

    @get(summary="List a tenant's service accounts", permission="service-account.read")
    async def list_service_accounts(self, plane: Plane, tenant: Name) -> Sequence[PrincipalView]:
        await plane.tenants.find(tenant)
        return plane.identities.list(tenant)

    @post(summary="Create a service account", permission="service-account.write")
    async def create_service_account(
        self, plane: Plane, tenant: Name, data: JSONBody[ServiceAccountSpec]
    ) -> PrincipalView:
        note(name=data.name)
        return await plane.identities.create_service_account(tenant, data.name)

    @delete("/{name:str}", summary="Remove a service account, its role and tokens", permission="service-account.write")
    async def remove_service_account(self, plane: Plane, tenant: Name, name: Name) -> None:
        await plane.identities.remove(f"{tenant}/{name}")


class BindingRoutes(Controller):
    path = "/tenants/{tenant:str}/bindings"
    tags = ("identities",)

    @get(summary="Who has which role in a tenant", permission="binding.read")
    async def list_bindings(self, plane: Plane, tenant: Name) -> Sequence[BindingView]:
        await plane.tenants.find(tenant)
        return plane.identities.bindings(tenant)

    @put(summary="Give a principal a role in a tenant, instead of the one that it has", permission="binding.write")
    async def bind(self, plane: Plane, tenant: Name, sender: Sender, data: JSONBody[BindingSpec]) -> BindingView:
        note(name=data.user, role=data.role)
        return await plane.identities.bind(sender, data.user, data.role, tenant)

    @delete(summary="Take the role of a principal in a tenant", permission="binding.write")
    async def unbind(self, plane: Plane, tenant: Name, sender: Sender, user: Word) -> None:
        note(name=user)
        await plane.identities.unbind(sender, user, tenant)


class HostBindingRoutes(Controller):
    path = "/bindings"
    tags = ("identities",)

    @get(summary="Who has which role on the host", permission="user.read")
    async def list_host_bindings(self, plane: Plane) -> Sequence[BindingView]:
        return plane.identities.bindings(None)

    @put(summary="Give a principal a role on the host", permission="user.write")
    async def bind_on_host(self, plane: Plane, sender: Sender, data: JSONBody[BindingSpec]) -> BindingView:
        note(name=data.user, role=data.role)
        return await plane.identities.bind(sender, data.user, data.role, None)

    @delete(summary="Take the role of a principal on the host", permission="user.write")
    async def unbind_on_host(self, plane: Plane, sender: Sender, user: Word) -> None:
        note(name=user)
        await plane.identities.unbind(sender, user, None)


class TokenRoutes(Controller):
    path = "/tokens"
    tags = ("identities",)

    @get(summary="List one's own tokens; with `all`, those of everybody", permission="self.read")
    async def list_tokens(self, plane: Plane, sender: Sender, all: Flag = False) -> Sequence[TokenView]:  # noqa: A002
        if all or sender.principal is None:
            sender.check("user.read")
            return plane.identities.tokens()
        return plane.identities.tokens(sender.principal.id)

    @post(summary="Make a token; its secret is shown once", permission="self.token")
    async def create_token(self, plane: Plane, sender: Sender, data: JSONBody[TokenSpec]) -> TokenCreated:
        note(name=data.user)
        created = await plane.identities.create_token(sender, data)
        note(token=created.id)
        return created

    @delete("/{token:str}", summary="Revoke a token", permission="self.read")
    async def revoke_token(self, plane: Plane, sender: Sender, token: Name) -> None:
        note(token=token)
        await plane.identities.revoke_token(sender, token)
