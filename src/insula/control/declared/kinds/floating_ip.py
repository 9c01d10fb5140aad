"""FloatingIp: the instance that it is attached to can be changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from insula.control.declared.kinds.base import Current, DeclaredDocument, ObjectReference, Verbs, form_of, spec_like
from insula.control.declared.kinds.owned import OwnedKind, OwnedVerbs
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.control.keys import FLOATING_IPS
from insula.model.errors import Invalid, NotFound
from insula.model.floating_ips import FloatingIpPatch, FloatingIpSpec
from insula.model.units import check_label

DeclaredFloatingIp = spec_like(
    FloatingIpSpec, "DeclaredFloatingIp", "The spec of a floating address.", "name", "labels"
)


class FloatingIpDocument(DeclaredDocument, kw_only=True, tag="FloatingIp"):
    spec: DeclaredFloatingIp = DeclaredFloatingIp()  # type: ignore[valid-type]


class FloatingIpKind(OwnedKind):
    name = "FloatingIp"
    document = FloatingIpDocument
    spec = DeclaredFloatingIp
    keys = FLOATING_IPS
    family = "floating-ip"
    in_place: ClassVar[Sequence[FieldPath]] = [("labels",), ("spec", "instance"), ("spec", "network")]

    def verbs_of(self, verbs: Verbs) -> OwnedVerbs:
        return verbs.floating_ips

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        form = form_of(self.decode(spec))
        for what in ("instance", "network"):
            if form[what] is not None:
                check_label(what, form[what])
        if form["network"] is not None and form["instance"] is None:
            raise Invalid(f"FloatingIp/{ref.name} has a network without an instance", "name the instance that is on it")
        if form["address"] is not None:
            form["family"] = "ipv6" if ":" in form["address"] else "ipv4"
        return form

    def depends(self, ref: ObjectReference, form: Form) -> Iterable[ObjectReference]:
        instance = (form.get("spec") or {}).get("instance")
        return [*super().depends(ref, form), *([ObjectReference("Instance", ref.tenant, instance)] if instance else [])]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        assert ref.tenant is not None
        try:
            view = await verbs.floating_ips.get(ref.tenant, ref.name)
        except NotFound:
            return None
        found = view.floating_ip
        spec = {
            "address": found.address,
            "instance": view.instance,
            "network": found.network if view.instance else None,
        }
        return Current({"labels": found.labels, "spec": self.check(ref, spec, {})}, str(found.created))

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        spec = FloatingIpSpec(name=ref.name, labels=form["labels"], **form["spec"])
        await verbs.floating_ips.allocate(ref.tenant, spec)

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        if before["labels"] != after["labels"]:
            await verbs.floating_ips.relabel(ref.tenant, ref.name, after["labels"])
        spec = after["spec"]
        patch = FloatingIpPatch(instance=spec["instance"], network=spec["network"])
        await verbs.floating_ips.update(ref.tenant, ref.name, patch)
