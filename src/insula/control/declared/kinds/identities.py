"""User, ServiceAccount and Binding: principals and their roles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import msgspec

from insula.control.declared.kinds.base import (
    AccessMode,
    Current,
    DeclaredDocument,
    DeclaredKind,
    ObjectReference,
    Verbs,
)
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.model.errors import Invalid, NotFound
from insula.model.objects import Struct
from insula.model.permissions import HOST_ROLES, TENANT_ROLES, Role
from insula.model.units import check_label

_ACCOUNT = "service-account/"
"""The start of the name, among bindings, of those of service accounts."""


class DeclaredUser(Struct, kw_only=True):
    uid: Annotated[int, msgspec.Meta(ge=1, le=0xFFFFFFFE)] | None = None


class UserDocument(DeclaredDocument, kw_only=True, tag="User"):
    spec: DeclaredUser = DeclaredUser()


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
        return Current({"labels": {}, "spec": {"uid": found.uid}}, found.id)

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        await verbs.identities.create_user(ref.name, form["spec"]["uid"])

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
    """The role of a principal, whose name is that of the binding; `subject` is its kind."""

    role: Role
    subject: Literal["user", "service-account"] = "user"


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
        name = check_label("principal", document.metadata.name)
        if document.spec.subject == "user":
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
        account = ref.name.startswith(_ACCOUNT)
        yield (
            ObjectReference("ServiceAccount", ref.tenant, self.plain_name(ref))
            if account
            else ObjectReference("User", None, ref.name)
        )

    def plain_name(self, ref: ObjectReference) -> str:
        return ref.name.removeprefix(_ACCOUNT)

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        if tenant is None:
            return "user.read" if access == "read" else "user.write"
        return "binding.read" if access == "read" else "binding.write"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        found = verbs.identities.bindings(tenant)
        return [view.user if view.kind == "user" else _ACCOUNT + view.user.partition("/")[2] for view in found]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        try:
            view = verbs.identities.get(_label(ref))
        except NotFound:
            return None
        for each in view.bindings:
            if each.tenant == ref.tenant:
                return Current({"labels": {}, "spec": {"role": each.role, "subject": each.kind}}, view.principal.id)
        return None

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        await verbs.identities.bind(by, _label(ref), form["spec"]["role"], ref.tenant)

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        await self.create(verbs, by, ref, after)

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        await verbs.identities.unbind(by, _label(ref), ref.tenant)


def _label(ref: ObjectReference) -> str:
    """Return the principal of a binding, as `Identities` names it."""
    account = ref.name.removeprefix(_ACCOUNT)
    return ref.name if account == ref.name else f"{ref.tenant}/{account}"
