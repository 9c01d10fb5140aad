"""Policy and AddressGroup: all parts of them can be changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import msgspec

from insula.control.declared.kinds.base import (
    DeclaredDocument,
    ObjectReference,
    Verbs,
    form_of,
    spec_like,
)
from insula.control.declared.kinds.owned import OwnedKind, OwnedVerbs
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.control.keys import ADDRESS_GROUPS, POLICIES
from insula.control.networks.policy_checks import check_cidrs, check_directions, check_rules, check_selector
from insula.model.policy_views import AddressGroupSpec, PolicySpec

DeclaredPolicy = spec_like(PolicySpec, "DeclaredPolicy", "The spec of a policy.", "name", "labels")
DeclaredAddressGroup = spec_like(
    AddressGroupSpec, "DeclaredAddressGroup", "The spec of an address group.", "name", "labels"
)


class PolicyDocument(DeclaredDocument, kw_only=True, tag="Policy"):
    spec: DeclaredPolicy  # type: ignore[valid-type]


class AddressGroupDocument(DeclaredDocument, kw_only=True, tag="AddressGroup"):
    spec: DeclaredAddressGroup  # type: ignore[valid-type]


class PolicyKind(OwnedKind):
    name = "Policy"
    document = PolicyDocument
    spec = DeclaredPolicy
    keys = POLICIES
    family = "policy"
    in_place: ClassVar[Sequence[FieldPath]] = [
        ("labels",),
        *(("spec", name) for name in ("select", "directions", "rules", "audit", "dns")),
    ]

    def verbs_of(self, verbs: Verbs) -> OwnedVerbs:
        return verbs.policies

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

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.policies.create(ref.tenant, _spec(ref.name, form))

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        await verbs.policies.replace(ref.tenant, ref.name, _spec(ref.name, after))


def _spec(name: str, form: Form) -> PolicySpec:
    return msgspec.convert({"name": name, "labels": form["labels"], **form["spec"]}, PolicySpec)


class AddressGroupKind(OwnedKind):
    name = "AddressGroup"
    document = AddressGroupDocument
    spec = DeclaredAddressGroup
    keys = ADDRESS_GROUPS
    family = "policy"
    in_place: ClassVar[Sequence[FieldPath]] = [("labels",), ("spec", "cidrs")]

    def verbs_of(self, verbs: Verbs) -> OwnedVerbs:
        return verbs.address_groups

    def spec_of(self, ref: ObjectReference, found: Any) -> Form:
        return {"cidrs": sorted(found.cidrs)}

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        return {"cidrs": sorted(check_cidrs(self.decode(spec).cidrs))}

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.address_groups.create(ref.tenant, ref.name, form["spec"]["cidrs"], form["labels"])

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        await verbs.address_groups.replace(ref.tenant, ref.name, after["spec"]["cidrs"], after["labels"])
