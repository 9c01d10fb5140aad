"""Policy and AddressGroup: all parts of them can be changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from insula.control.keys import ADDRESS_GROUPS, POLICIES
from insula.control.networks.policy_checks import check_cidrs, check_directions, check_rules, check_selector
from insula.model.errors import NotFound
from insula.model.policy_views import AddressGroupSpec, PolicySpec

DeclaredPolicy = spec_like(PolicySpec, "DeclaredPolicy", "The spec of a policy.", "name", "labels")
DeclaredAddressGroup = spec_like(
    AddressGroupSpec, "DeclaredAddressGroup", "The spec of an address group.", "name", "labels"
)


class PolicyDocument(DeclaredDocument, kw_only=True, tag="Policy"):
    spec: DeclaredPolicy  # type: ignore[valid-type]


class AddressGroupDocument(DeclaredDocument, kw_only=True, tag="AddressGroup"):
    spec: DeclaredAddressGroup  # type: ignore[valid-type]


class PolicyKind(DeclaredKind):
    name = "Policy"
    document = PolicyDocument
    spec = DeclaredPolicy
    in_place: ClassVar[Sequence[FieldPath]] = [
        ("labels",),
        *(("spec", name) for name in ("select", "directions", "rules", "audit", "dns")),
    ]

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        decoded = self.decode(spec)
        directions = check_directions(decoded.directions)
        checked = msgspec.structs.replace(
            decoded,
            select=check_selector(decoded.select),
            directions=directions,
            rules=check_rules(decoded.rules, directions),
        )
        return form_of(checked)

    def depends(self, ref: ObjectReference, form: Form) -> Iterable[ObjectReference]:
        found = [*super().depends(ref, form)]
        for rule in (form.get("spec") or {}).get("rules") or []:
            for peer in rule.get("peers") or []:
                if peer.get("group"):
                    found.append(ObjectReference("AddressGroup", ref.tenant, peer["group"]))
                if peer.get("network"):
                    found.append(ObjectReference("Network", ref.tenant, peer["network"]))
        return list(dict.fromkeys(found))

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return "policy.read" if access == "read" else "policy.write"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        assert tenant is not None
        return [policy.name for policy in await POLICIES.readable(verbs.policies.context.store, tenant)]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        assert ref.tenant is not None
        try:
            found = (await verbs.policies.find(ref.tenant, ref.name)).value
        except NotFound:
            return None
        form = form_of(found)
        spec = {name: form[name] for name in DeclaredPolicy.__struct_fields__}
        return Current({"labels": found.labels, "spec": spec}, str(found.created))

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.policies.create(ref.tenant, _spec(ref.name, form))

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        await verbs.policies.replace(ref.tenant, ref.name, _spec(ref.name, after))

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        assert ref.tenant is not None
        await verbs.policies.remove(ref.tenant, ref.name)


def _spec(name: str, form: Form) -> PolicySpec:
    return msgspec.convert({"name": name, "labels": form["labels"], **form["spec"]}, PolicySpec)


class AddressGroupKind(DeclaredKind):
    name = "AddressGroup"
    document = AddressGroupDocument
    spec = DeclaredAddressGroup
    in_place: ClassVar[Sequence[FieldPath]] = [("labels",), ("spec", "cidrs")]

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        return {"cidrs": sorted(check_cidrs(self.decode(spec).cidrs))}

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return "policy.read" if access == "read" else "policy.write"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        assert tenant is not None
        return [group.name for group in await ADDRESS_GROUPS.readable(verbs.policies.context.store, tenant)]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        assert ref.tenant is not None
        try:
            found = (await verbs.address_groups.find(ref.tenant, ref.name)).value
        except NotFound:
            return None
        return Current({"labels": found.labels, "spec": {"cidrs": sorted(found.cidrs)}}, str(found.created))

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.address_groups.create(ref.tenant, ref.name, form["spec"]["cidrs"], form["labels"])

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        await verbs.address_groups.replace(ref.tenant, ref.name, after["spec"]["cidrs"], after["labels"])

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        assert ref.tenant is not None
        await verbs.address_groups.remove(ref.tenant, ref.name)
