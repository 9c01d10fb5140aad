"""User, ServiceAccount and Binding: principals and their roles."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

import msgspec

from insula.control.declared.kinds.base import (
    AccessMode,
    Current,
    DeclaredDocument,
    DeclaredKind,
    ObjectReference,
    Verbs,
    spec_like,
)
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.model import fields, rules
from insula.model.errors import Invalid, NotFound
from insula.model.objects import Struct
from insula.model.permissions import HOST_ROLES, TENANT_ROLES, Role
from insula.model.principals import PrincipalKind, UserSpec
from insula.model.units import check_label, shorten

Group = Annotated[str, fields.schema(pattern=rules.anchored(rules.GROUP), maxLength=rules.MAX_BOUND)]
_ACCOUNT, _GROUP = "service-account/", "group/"
"""The starts of names, among bindings, of those of service accounts and groups."""

DeclaredUser = spec_like(
    UserSpec,
    "DeclaredUser",
    "How a user is known: a user ID of the host, or a subject of a provider of OpenID Connect.",
    "name",
)


class UserDocument(DeclaredDocument, kw_only=True, tag="User"):
    spec: DeclaredUser = msgspec.field(default_factory=DeclaredUser)  # type: ignore[valid-type]


class UserKind(DeclaredKind):
    name = "User"
    document = UserDocument
    spec = DeclaredUser
    of_host, of_tenant = True, False
    has_labels = False

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return "user.read" if access == "read" else "user.write"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        return [view.principal.name for view in verbs.identities.list()]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        try:
            found = verbs.identities.get(ref.name).principal
        except NotFound:
            return None
        known = verbs.identities.context.settings.oidc
        provider = next((each.name for each in known if each.issuer == found.issuer), None)
        spec = {"uid": found.uid, "provider": provider, "subject": found.subject}
        return Current({"labels": {}, "spec": spec}, found.id)

    async def admit(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        verbs.identities.admit_user(ref.name, **form["spec"])  # its roles and tokens would be gone for nothing

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        await verbs.identities.create_user(ref.name, **form["spec"])

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        await verbs.identities.remove(ref.name)


class DeclaredServiceAccount(Struct, kw_only=True):
    pass


class ServiceAccountDocument(DeclaredDocument, kw_only=True, tag="ServiceAccount"):
    spec: DeclaredServiceAccount = DeclaredServiceAccount()


class ServiceAccountKind(DeclaredKind):
    name = "ServiceAccount"
    document = ServiceAccountDocument
    spec = DeclaredServiceAccount
    has_labels = False

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return "service-account.read" if access == "read" else "service-account.write"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        return [view.principal.name for view in verbs.identities.list(tenant)]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        try:
            found = verbs.identities.get(f"{ref.tenant}/{ref.name}").principal
        except NotFound:
            return None
        return Current({"labels": {}, "spec": {}}, found.id)

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.identities.create_service_account(ref.tenant, ref.name)

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        await verbs.identities.remove(f"{ref.tenant}/{ref.name}")


class DeclaredBinding(Struct, kw_only=True):
    """The role of a principal, whose kind is `subject`. The name of the binding is that of the user or service account.
    For a group of a provider of OpenID Connect it is any, and `group` is PROVIDER:GROUP."""

    role: Role
    subject: PrincipalKind = "user"
    group: Group | None = None


class BindingDocument(DeclaredDocument, kw_only=True, tag="Binding"):
    spec: DeclaredBinding


class BindingKind(DeclaredKind):
    name = "Binding"
    document = BindingDocument
    spec = DeclaredBinding
    of_host = True
    has_labels = False
    in_place: ClassVar[Sequence[FieldPath]] = [("spec", "role")]

    def reference(self, document: DeclaredDocument, tenant: str | None) -> ObjectReference:
        assert isinstance(document, BindingDocument)
        name, spec = check_label("principal", document.metadata.name), document.spec
        if (spec.subject == "group") != (spec.group is not None):
            raise Invalid("only a binding of a group has `group`, and it has one", "write group: PROVIDER:GROUP")
        if spec.group is not None:
            if not re.fullmatch(rules.GROUP, spec.group):
                raise Invalid(f"{shorten(spec.group)} is no group", "write PROVIDER:GROUP, with up to 256 characters")
            return ObjectReference(self.name, tenant, _GROUP + spec.group)
        if spec.subject == "user":
            return ObjectReference(self.name, tenant, name)
        if tenant is None:
            raise Invalid("a service account has no role on the host", "name its tenant")
        return ObjectReference(self.name, tenant, _ACCOUNT + name)

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        full = super().check(ref, spec, labels)
        roles = HOST_ROLES if ref.tenant is None else TENANT_ROLES
        if full["role"] not in roles:
            where = "on the host" if ref.tenant is None else "in a tenant"
            raise Invalid(f"the role {full['role']} can't be bound {where}", f"use one of {', '.join(roles)}")
        return full

    def depends(self, ref: ObjectReference, form: Form) -> Iterable[ObjectReference]:
        yield from super().depends(ref, form)
        if ref.name.startswith(_ACCOUNT):
            yield ObjectReference("ServiceAccount", ref.tenant, self.plain_name(ref))
        elif not ref.name.startswith(_GROUP):
            yield ObjectReference("User", None, ref.name)

    def plain_name(self, ref: ObjectReference) -> str:
        if ref.name.startswith(_GROUP):
            return f"group-{hashlib.sha256(ref.name.encode()).hexdigest()[:12]}"
        return ref.name.removeprefix(_ACCOUNT)

    def label(self, ref: ObjectReference) -> str:
        return ref.name.removeprefix(_ACCOUNT).removeprefix(_GROUP)

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        if tenant is None:
            return "user.read" if access == "read" else "user.write"
        return "binding.read" if access == "read" else "binding.write"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        starts = {"user": "", "service-account": _ACCOUNT, "group": _GROUP}
        found = verbs.identities.bindings(tenant)
        return [
            starts[view.kind] + (view.user.partition("/")[2] if view.kind == "service-account" else view.user)
            for view in found
        ]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        try:
            view = verbs.identities.get(_label(ref))
        except NotFound:
            return None
        for each in view.bindings:
            if each.tenant == ref.tenant:
                group = each.user if each.kind == "group" else None
                spec = {"role": each.role, "subject": each.kind, "group": group}
                return Current({"labels": {}, "spec": spec}, view.principal.id)
        return None

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        await verbs.identities.bind(by, _label(ref), form["spec"]["role"], ref.tenant)

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        await self.create(verbs, by, ref, after)

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        await verbs.identities.unbind(by, _label(ref), ref.tenant)


def _label(ref: ObjectReference) -> str:
    """Return the principal of a binding, as `Identities` names it."""
    if ref.name.startswith(_ACCOUNT):
        return f"{ref.tenant}/{ref.name.removeprefix(_ACCOUNT)}"
    return ref.name.removeprefix(_GROUP)
