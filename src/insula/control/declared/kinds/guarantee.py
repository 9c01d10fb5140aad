"""Guarantee: the floors and ceilings of an instance, whose name it has. Those of a tenant are part of the Tenant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from insula.control.declared.kinds.base import (
    AccessMode,
    Current,
    DeclaredDocument,
    DeclaredKind,
    ObjectReference,
    Verbs,
    form_of,
)
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.control.networks.guarantees import check_values
from insula.model.errors import Invalid, NotFound
from insula.model.guarantees import VALUES, GuaranteePatch, GuaranteeSpec, GuaranteeView


class GuaranteeDocument(DeclaredDocument, kw_only=True, tag="Guarantee"):
    spec: GuaranteeSpec


class GuaranteeKind(DeclaredKind):
    name = "Guarantee"
    document = GuaranteeDocument
    spec = GuaranteeSpec
    has_labels = False
    in_place: ClassVar[Sequence[FieldPath]] = [("spec", name) for name in VALUES]

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        form = form_of(self.decode(spec))
        if all(value is None for value in form.values()):
            raise Invalid(f"Guarantee/{ref.name} promises and limits nothing", "give it a floor or a ceiling")
        check_values(form, ref.name)
        return form

    def default(self, verbs: Verbs, ref: ObjectReference, full: Form) -> Form:
        return {"labels": {}, "spec": form_of(GuaranteeSpec())}

    def depends(self, ref: ObjectReference, form: Form) -> Iterable[ObjectReference]:
        return [*super().depends(ref, form), ObjectReference("Instance", ref.tenant, ref.name)]

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return "guarantee.read" if access == "read" else "guarantee.write"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        assert tenant is not None
        return [each.instance for each in await verbs.guarantees.list(tenant) if each.instance is not None]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        assert ref.tenant is not None
        try:
            found = await verbs.guarantees.get(ref.tenant, ref.name)
        except NotFound:
            return None
        return Current({"labels": {}, "spec": values_of(found)}, str(found.created))

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.guarantees.set(ref.tenant, GuaranteePatch(**form["spec"]), ref.name)

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        await self.create(verbs, by, ref, after)

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        assert ref.tenant is not None
        await verbs.guarantees.clear(ref.tenant, ref.name)


def values_of(view: GuaranteeView) -> Form:
    """The floors and ceilings of a guarantee."""
    return {name: getattr(view, name) for name in GuaranteeSpec.__struct_fields__}
