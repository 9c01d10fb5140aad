"""Tenant: its limits, guarantee and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from insula.control.allocation.quotas import limits_of
from insula.control.declared.kinds.base import (
    AccessMode,
    Current,
    DeclaredDocument,
    DeclaredKind,
    ObjectReference,
    Verbs,
    form_of,
)
from insula.control.declared.kinds.guarantee import values_of
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.control.networks.guarantees import check_values
from insula.model.errors import NotFound
from insula.model.guarantees import GuaranteePatch, GuaranteeSpec
from insula.model.objects import Limits, Struct
from insula.model.quota_settings import new_limits
from insula.model.views import LimitsPatch, TenantPatch


class DeclaredTenant(Struct, kw_only=True):
    """The limits of a tenant; one that is absent is that of new tenants, and null is no limit. `guarantee` are the
    floors and ceilings of the tenant as a whole; one that is absent or null is none."""

    limits: LimitsPatch = LimitsPatch()
    guarantee: GuaranteeSpec = GuaranteeSpec()


class TenantDocument(DeclaredDocument, kw_only=True, tag="Tenant"):
    spec: DeclaredTenant = DeclaredTenant()


class TenantKind(DeclaredKind):
    name = "Tenant"
    document = TenantDocument
    spec = DeclaredTenant
    of_host, of_tenant = True, False
    in_place: ClassVar[Sequence[FieldPath]] = [("labels",), ("spec", "limits"), ("spec", "guarantee")]

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        decoded = self.decode(spec)
        limits_of(Limits(), decoded.limits)
        check_values(form_of(decoded.guarantee), None)
        return form_of(decoded)

    def default(self, verbs: Verbs, ref: ObjectReference, full: Form) -> Form:
        limits = new_limits(verbs.tenants.context.settings.quotas)
        return {"labels": {}, "spec": {"limits": form_of(limits), "guarantee": form_of(GuaranteeSpec())}}

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return {"create": "tenant.create", "update": "tenant.limits", "remove": "tenant.remove", "read": "host.read"}[
            access
        ]

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        return [view.tenant.name for view in await verbs.tenants.list()]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        try:
            found = (await verbs.tenants.find(ref.name)).value
        except NotFound:
            return None
        try:
            guarantee = values_of(await verbs.guarantees.get(ref.name))
        except NotFound:
            guarantee = form_of(GuaranteeSpec())
        form = {"labels": found.labels, "spec": {"limits": form_of(found.limits), "guarantee": guarantee}}
        return Current(form, f"{found.index}-{found.created}")

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        limits = msgspec.convert(form["spec"]["limits"], LimitsPatch)
        await verbs.tenants.create(ref.name, limits, form["labels"])
        guarantee = form["spec"].get("guarantee") or {}
        if any(value is not None for value in guarantee.values()):
            await verbs.guarantees.set(ref.name, GuaranteePatch(**guarantee))

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        if before["labels"] != after["labels"]:
            await verbs.tenants.relabel(ref.name, after["labels"])
        old, new = before["spec"]["limits"], after["spec"]["limits"]
        if changed := {name: value for name, value in new.items() if old.get(name) != value}:
            await verbs.tenants.update(ref.name, msgspec.convert(changed, TenantPatch))
        if before["spec"]["guarantee"] != after["spec"]["guarantee"]:
            await verbs.guarantees.set(ref.name, GuaranteePatch(**after["spec"]["guarantee"]))

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        await verbs.tenants.remove(ref.name)
