"""Router: its networks and routes can be changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

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
from insula.control.keys import ROUTERS
from insula.model.routers import RouterSpec, StaticRoute
from insula.model.units import check_label
from insula.network.routes import parse_route

DeclaredRouter = spec_like(RouterSpec, "DeclaredRouter", "The spec of a router.", "name", "labels")


class RouterDocument(DeclaredDocument, kw_only=True, tag="Router"):
    spec: DeclaredRouter = DeclaredRouter()  # type: ignore[valid-type]


class RouterKind(OwnedKind):
    name = "Router"
    document = RouterDocument
    spec = DeclaredRouter
    keys = ROUTERS
    family = "network"
    in_place: ClassVar[Sequence[FieldPath]] = [("labels",), ("spec", "networks"), ("spec", "routes")]

    def verbs_of(self, verbs: Verbs) -> OwnedVerbs:
        return verbs.routers

    def spec_of(self, ref: ObjectReference, found: Any) -> Form:
        spec = {"networks": found.networks, "routes": [form_of(route) for route in found.routes]}
        return self.check(ref, spec, {})

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        decoded = self.decode(spec)
        networks = sorted({check_label("network", name) for name in decoded.networks})
        routes = sorted(map(parse_route, decoded.routes), key=lambda route: route.destination)
        return {"networks": networks, "routes": [form_of(route) for route in routes]}

    def depends(self, ref: ObjectReference, form: Form) -> Iterable[ObjectReference]:
        networks = (form.get("spec") or {}).get("networks") or []
        return [*super().depends(ref, form), *(ObjectReference("Network", ref.tenant, name) for name in networks)]

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.routers.create(ref.tenant, ref.name, *_parts(form), form["labels"])

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        await verbs.routers.replace(ref.tenant, ref.name, *_parts(after), after["labels"])


def _parts(form: Form) -> tuple[list[str], list[StaticRoute]]:
    """The networks and routes of a form."""
    spec = form["spec"]
    return spec["networks"], [StaticRoute(**route) for route in spec["routes"]]
