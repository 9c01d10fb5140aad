"""OperatorPolicy: a policy of the operator, above those of tenants. All parts of it can be changed in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from insula.control.declared.kinds.base import (
    AccessMode,
    Current,
    DeclaredDocument,
    DeclaredKind,
    ObjectReference,
    Verbs,
    form_of,
    spec_like,
)
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.control.networks.operator_policies import checked
from insula.model.errors import NotFound
from insula.model.policy_views import OperatorPolicyPatch, OperatorPolicySpec

DeclaredOperatorPolicy = spec_like(
    OperatorPolicySpec, "DeclaredOperatorPolicy", "The spec of a policy of the operator.", "name", "labels"
)


class OperatorPolicyDocument(DeclaredDocument, kw_only=True, tag="OperatorPolicy"):
    spec: DeclaredOperatorPolicy  # type: ignore[valid-type]


class OperatorPolicyKind(DeclaredKind):
    name = "OperatorPolicy"
    document = OperatorPolicyDocument
    spec = DeclaredOperatorPolicy
    of_host, of_tenant = True, False
    in_place: ClassVar[Sequence[FieldPath]] = [
        ("labels",),
        *(("spec", name) for name in ("priority", "tenants", "rules")),
    ]

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        decoded = self.decode(spec)
        canonical = checked(msgspec.convert(form_of(decoded), OperatorPolicyPatch))
        return form_of(msgspec.structs.replace(decoded, **canonical))

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return f"operator-policy.{'read' if access == 'read' else 'write'}"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        return [policy.name for policy in await verbs.operator_policies.list()]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        try:
            found = await verbs.operator_policies.get(ref.name)
        except NotFound:
            return None
        form = form_of(found)
        spec = {name: form[name] for name in self.spec.__struct_fields__}
        return Current({"labels": found.labels, "spec": spec}, str(found.created))

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        whole = {"name": ref.name, "labels": form["labels"], **form["spec"]}
        await verbs.operator_policies.create(msgspec.convert(whole, OperatorPolicySpec))

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        patch = msgspec.convert({"labels": after["labels"], **after["spec"]}, OperatorPolicyPatch)
        await verbs.operator_policies.update(ref.name, patch)

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        await verbs.operator_policies.remove(ref.name)
