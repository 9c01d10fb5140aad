"""/v1/whoami, users, tokens, bindings and, below tenants, service accounts and bindings."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from datetime import timedelta

from litestar import Controller, delete, get, post, put
from litestar.params import JSONBody

from insula.api.audit import note
from insula.api.authorities import authorities, server_authorities
from insula.api.pages import Paged
from insula.api.parameters import Bound, Flag, Name, Plane, Sender, Serial, TenantName, TokenId
from insula.control.identities.authority import Authority
from insula.model.principals import (
    BindingSpec,
    BindingView,
    CertificateCreated,
    CertificateSpec,
    CertificateView,
    Invitation,
    JoinSpec,
    PrincipalView,
    ServiceAccountSpec,
    TokenCreated,
    TokenSpec,
    TokenView,
    UserSpec,
    WhoAmI,
)
from insula.settings import split_address


@get("/whoami", tags=["identities"], summary="The sender of this request, and its roles", permission="self.read")
async def whoami(plane: Plane, sender: Sender) -> WhoAmI:
    return plane.identities.whoami(sender)


class UserRoutes(Controller):
    path = "/users"
    tags = ("identities",)

    @get(summary="List the users", permission="user.read")
    async def list_users(self, plane: Plane, page: Paged) -> Sequence[PrincipalView]:
        return page.of(plane.identities.list(), _name_of)

    @post(summary="Create a user", permission="user.write")
    async def create_user(self, plane: Plane, data: JSONBody[UserSpec]) -> PrincipalView:
        note(name=data.name)
        return await plane.identities.create_user(data.name, data.uid, provider=data.provider, subject=data.subject)

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
    async def list_service_accounts(self, plane: Plane, tenant: TenantName, page: Paged) -> Sequence[PrincipalView]:
        await plane.tenants.find(tenant)
        return page.of(plane.identities.list(tenant), _name_of)

    @post(summary="Create a service account", permission="service-account.write")
    async def create_service_account(
        self, plane: Plane, tenant: TenantName, data: JSONBody[ServiceAccountSpec]
    ) -> PrincipalView:
        note(name=data.name)
        return await plane.identities.create_service_account(tenant, data.name)

    @delete("/{name:str}", summary="Remove a service account, its role and tokens", permission="service-account.write")
    async def remove_service_account(self, plane: Plane, tenant: TenantName, name: Name) -> None:
        await plane.identities.remove(f"{tenant}/{name}")


class BindingRoutes(Controller):
    path = "/tenants/{tenant:str}/bindings"
    tags = ("identities",)

    @get(summary="Who has which role in a tenant", permission="binding.read")
    async def list_bindings(self, plane: Plane, tenant: TenantName, page: Paged) -> Sequence[BindingView]:
        await plane.tenants.find(tenant)
        return page.of(plane.identities.bindings(tenant), lambda view: view.user)

    @put(summary="Give a principal a role in a tenant, instead of the one that it has", permission="binding.write")
    async def bind(self, plane: Plane, tenant: TenantName, sender: Sender, data: JSONBody[BindingSpec]) -> BindingView:
        note(name=data.user, role=data.role)
        return await plane.identities.bind(sender, data.user, data.role, tenant)

    @delete(summary="Take the role of a principal in a tenant", permission="binding.write")
    async def unbind(self, plane: Plane, tenant: TenantName, sender: Sender, user: Bound) -> None:
        note(name=user)
        await plane.identities.unbind(sender, user, tenant)


class HostBindingRoutes(Controller):
    path = "/bindings"
    tags = ("identities",)

    @get(summary="Who has which role on the host", permission="user.read")
    async def list_host_bindings(self, plane: Plane, page: Paged) -> Sequence[BindingView]:
        return page.of(plane.identities.bindings(None), lambda view: view.user)

    @put(summary="Give a principal a role on the host", permission="user.write")
    async def bind_on_host(self, plane: Plane, sender: Sender, data: JSONBody[BindingSpec]) -> BindingView:
        note(name=data.user, role=data.role)
        return await plane.identities.bind(sender, data.user, data.role, None)

    @delete(summary="Take the role of a principal on the host", permission="user.write")
    async def unbind_on_host(self, plane: Plane, sender: Sender, user: Bound) -> None:
        note(name=user)
        await plane.identities.unbind(sender, user, None)


class TokenRoutes(Controller):
    path = "/tokens"
    tags = ("identities",)

    @get(summary="List one's own tokens; with `all`, those of everybody", permission="self.read")
    async def list_tokens(
        self,
        plane: Plane,
        sender: Sender,
        page: Paged,
        all: Flag = False,  # noqa: A002
    ) -> Sequence[TokenView]:
        found = plane.identities.tokens(_whose(sender, everybody=all))
        return page.of(found, lambda view: view.user, key=lambda view: f"{view.created:020.6f} {view.id}")

    @post(summary="Make a token; its secret is shown once", permission="self.token", secret=True)
    async def create_token(self, plane: Plane, sender: Sender, data: JSONBody[TokenSpec]) -> TokenCreated:
        note(name=data.user)
        created = await plane.identities.create_token(sender, data)
        note(token=created.id)
        return created

    @delete("/{token:str}", summary="Revoke a token", permission="self.read")
    async def revoke_token(self, plane: Plane, sender: Sender, token: TokenId) -> None:
        note(token=token)
        await plane.identities.revoke_token(sender, token)


class CertificateRoutes(Controller):
    path = "/certificates"
    tags = ("identities",)

    @get(summary="List one's own certificates; with `all`, those of everybody", permission="self.read")
    async def list_certificates(
        self,
        plane: Plane,
        sender: Sender,
        page: Paged,
        all: Flag = False,  # noqa: A002
    ) -> Sequence[CertificateView]:
        found = plane.identities.certificates(_whose(sender, everybody=all))
        return page.of(found, lambda view: view.user, key=lambda view: f"{view.created:020.6f} {view.serial}")

    @post(summary="Make a key and a certificate for it; the key is shown once", permission="self.token", secret=True)
    async def create_certificate(
        self, plane: Plane, sender: Sender, data: JSONBody[CertificateSpec]
    ) -> CertificateCreated:
        note(name=data.user)
        certificates = authorities(plane)
        serial = random_serial()
        made = await plane.identities.record_certificate(sender, data.user, f"{serial:x}", data.ttl)
        pem = await asyncio.to_thread(certificates.client, serial, timedelta(seconds=data.ttl))
        note(certificate=made.serial)
        return CertificateCreated(serial=made.serial, pem=pem.decode(), expires=made.expires)

    @delete("/{serial:str}", summary="Revoke a certificate", permission="self.read")
    async def revoke_certificate(self, plane: Plane, sender: Sender, serial: Serial) -> None:
        note(certificate=serial)
        await plane.identities.revoke_certificate(sender, serial)


@post(
    "/invitations",
    tags=["identities"],
    summary="Invite a user to reach this host by HTTPS",
    permission="self.token",
    secret=True,
)
async def invite(plane: Plane, sender: Sender, data: JSONBody[JoinSpec]) -> Invitation:
    note(name=data.user)
    authority = await server_authorities(plane)
    made = await plane.identities.invite(sender, data.user, data.ttl)
    note(token=made.id)
    ports = {split_address(text)[1] for text in plane.settings.api.listen}
    hosts = plane.settings.api.names or [split_address(text)[0] for text in plane.settings.api.listen]
    addresses = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts for port in sorted(ports)]
    return Invitation(addresses=addresses, authority=authority, token=made.token, expires=made.expires)


@post(
    "/join",
    tags=["identities"],
    summary="Exchange an invitation for a token, once",
    permission="self.join",
    secret=True,
)
async def join(plane: Plane, sender: Sender) -> TokenCreated:
    created = await plane.identities.join(sender)
    note(token=created.id)
    return created


def _name_of(view: PrincipalView) -> str:
    return view.principal.name


def _whose(sender: Authority, *, everybody: bool) -> str | None:
    """The principal whose tokens or certificates are listed; None is everybody's. Denied."""
    if everybody or sender.principal is None:
        sender.check("user.read")
        return None
    return sender.principal.id


def random_serial() -> int:
    """Return a new serial number: positive, and 20 bytes at most (RFC 5280, 4.1.2.2)."""
    return int.from_bytes(os.urandom(19), "big") | 1
