"""LoadBalancer: all of it but its addresses can be changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import msgspec

from insula.control.declared.kinds.base import DeclaredDocument, ObjectReference, Verbs, form_of, spec_like
from insula.control.declared.kinds.owned import OwnedKind, OwnedVerbs
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.control.keys import LOAD_BALANCERS
from insula.control.networks.load_balancers import check_spec
from insula.model.load_balancers import LoadBalancerSpec

DeclaredLoadBalancer = spec_like(
    LoadBalancerSpec, "DeclaredLoadBalancer", "The spec of a load balancer.", "name", "labels"
)
_CHANGEABLE = ("listen", "port", "select", "instances", "affinity", "health")


class LoadBalancerDocument(DeclaredDocument, kw_only=True, tag="LoadBalancer"):
    spec: DeclaredLoadBalancer  # type: ignore[valid-type]


class LoadBalancerKind(OwnedKind):
    name = "LoadBalancer"
    document = LoadBalancerDocument
    spec = DeclaredLoadBalancer
    keys = LOAD_BALANCERS
    family = "load-balancer"
    in_place: ClassVar[Sequence[FieldPath]] = [("labels",), *(("spec", name) for name in _CHANGEABLE)]

    def verbs_of(self, verbs: Verbs) -> OwnedVerbs:
        return verbs.load_balancers

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        return form_of(check_spec(_spec(ref, {"spec": form_of(self.decode(spec)), "labels": labels})), "name", "labels")

    def depends(self, ref: ObjectReference, form: Form) -> Iterable[ObjectReference]:
        spec = form.get("spec") or {}
        found = [*super().depends(ref, form)]
        for place in spec.get("on") or []:
            if place.get("network"):
                found.append(ObjectReference("Network", ref.tenant, place["network"]))
            if place.get("floating_ip"):
                found.append(ObjectReference("FloatingIp", ref.tenant, place["floating_ip"]))
        return found

    def spec_of(self, ref: ObjectReference, found: Any) -> Form:
        spec = {name: value for name, value in form_of(found).items() if name in (*_CHANGEABLE, "on")}
        return self.check(ref, spec, {})

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.load_balancers.create(ref.tenant, _spec(ref, form))

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        await verbs.load_balancers.replace(ref.tenant, _spec(ref, after))


def _spec(ref: ObjectReference, form: dict[str, Any]) -> LoadBalancerSpec:
    return msgspec.convert({"name": ref.name, "labels": form["labels"], **form["spec"]}, LoadBalancerSpec)
