"""Network: its way out can be changed; its subnets are replaced."""

from __future__ import annotations

from collections.abc import Sequence
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
from insula.control.keys import NETWORKS
from insula.control.networks.verbs import check_mtu
from insula.model.errors import NotFound
from insula.model.views import NetworkPatch, NetworkSpec
from insula.network.addresses import check_disjoint, parse_subnet

DeclaredNetwork = spec_like(NetworkSpec, "DeclaredNetwork", "The spec of a network.", "name", "labels")


class NetworkDocument(DeclaredDocument, kw_only=True, tag="Network"):
    spec: DeclaredNetwork  # type: ignore[valid-type]


class NetworkKind(DeclaredKind):
    name = "Network"
    document = NetworkDocument
    spec = DeclaredNetwork
    in_place: ClassVar[Sequence[FieldPath]] = [("labels",), ("spec", "outbound")]

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        decoded = self.decode(spec)
        subnet6 = str(parse_subnet(decoded.subnet6, 6)) if decoded.subnet6 is not None else None
        check_mtu(decoded.mtu, has_ipv6=subnet6 is not None)
        return {**form_of(decoded), "subnet": str(parse_subnet(decoded.subnet, 4)), "subnet6": subnet6}

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return "network.read" if access == "read" else "network.write"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        assert tenant is not None
        return [network.name for network in await NETWORKS.readable(verbs.networks.context.store, tenant)]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        assert ref.tenant is not None
        try:
            found = (await verbs.networks.find(ref.tenant, ref.name)).value
        except NotFound:
            return None
        spec = {name: getattr(found, name) for name in DeclaredNetwork.__struct_fields__}
        return Current({"labels": found.labels, "spec": spec}, f"{found.index}-{found.created}")

    async def admit(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        spec, context = form["spec"], verbs.networks.context
        others = [each for each in await NETWORKS.list(context.store, ref.tenant) if each.name != ref.name]
        for version, name in ((4, "subnet"), (6, "subnet6")):
            if spec[name] is not None:
                subnet = parse_subnet(spec[name], version, reserved=context.fabric.reserved)
                check_disjoint(subnet, [(each.name, getattr(each, name)) for each in others])

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        await verbs.networks.create(ref.tenant, ref.name, **form["spec"], labels=form["labels"])

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        if before["labels"] != after["labels"]:
            await verbs.networks.relabel(ref.tenant, ref.name, after["labels"])
        if before["spec"]["outbound"] != after["spec"]["outbound"]:
            await verbs.networks.update(ref.tenant, ref.name, NetworkPatch(outbound=after["spec"]["outbound"]))

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        assert ref.tenant is not None
        await verbs.networks.remove(ref.tenant, ref.name)
