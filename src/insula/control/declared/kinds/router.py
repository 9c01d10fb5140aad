"""Router: its networks and routes can be changed in place."""

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
    spec_like,
)
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.control.keys import ROUTERS
from insula.model.errors import NotFound
from insula.model.routers import RouterSpec, StaticRoute
from insula.model.units import check_label
from insula.network.routes import parse_route

DeclaredRouter = spec_like(RouterSpec, "DeclaredRouter", "The spec of a router.", "name", "labels")


class RouterDocument(DeclaredDocument, kw_only=True, tag="Router"):
    spec: DeclaredRouter = DeclaredRouter()  # type: ignore[valid-type]


class RouterKind(DeclaredKind):
    name = "Router"
    document = RouterDocument
    spec = DeclaredRouter
    in_place: ClassVar[Sequence[FieldPath]] = [("labels",), ("spec", "networks"), ("spec", "routes")]

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        decoded = self.decode(spec)
        networks = sorted({check_label("network", name) for name in decoded.networks})
        routes = sorted(map(parse_route, decoded.routes), key=lambda route: route.destination)
        return {"networks": networks, "routes": [form_of(route) for route in routes]}

    def depends(self, ref: ObjectReference, form: Form) -> Iterable[ObjectReference]:
        networks = (form.get("spec") or {}).get("networks") or []
        return [*super().depends(ref, form), *(ObjectReference("Network", ref.tenant, name) for name in networks)]

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return "network.read" if access == "read" else "network.write"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        assert tenant is not None
        return [router.name for router in await ROUTERS.readable(verbs.routers.context.store, tenant)]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        assert ref.tenant is not None
        try:
            found = (await verbs.routers.find(ref.tenant, ref.name)).value
        except NotFound:
            return None
        spec = {"networks": found.networks, "routes": [form_of(route) for route in found.routes]}
        return Current({"labels": found.labels, "spec": self.check(ref, spec, {})}, str(found.created))

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.routers.create(ref.tenant, ref.name, *_parts(form), form["labels"])

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        await verbs.routers.replace(ref.tenant, ref.name, *_parts(after), after["labels"])

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        assert ref.tenant is not None
        await verbs.routers.remove(ref.tenant, ref.name)


def _parts(form: Form) -> tuple[list[str], list[StaticRoute]]:
    """The networks and routes of a form."""
    spec = form["spec"]
    return spec["networks"], [StaticRoute(**route) for route in spec["routes"]]
