"""Network: its way out can be changed; its subnets are replaced."""

from __future__ import annotations

from collections.abc import Sequence
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
from insula.control.keys import NETWORKS
from insula.control.networks.verbs import check_mtu
from insula.model.views import NetworkPatch, NetworkSpec
from insula.network.addresses import check_disjoint, parse_subnet

DeclaredNetwork = spec_like(NetworkSpec, "DeclaredNetwork", "The spec of a network.", "name", "labels")


class NetworkDocument(DeclaredDocument, kw_only=True, tag="Network"):
    spec: DeclaredNetwork  # type: ignore[valid-type]


class NetworkKind(OwnedKind):
    name = "Network"
    document = NetworkDocument
    spec = DeclaredNetwork
    keys = NETWORKS
    family = "network"
    in_place: ClassVar[Sequence[FieldPath]] = [("labels",), ("spec", "outbound")]

    def verbs_of(self, verbs: Verbs) -> OwnedVerbs:
        return verbs.networks

    def uid(self, found: Any) -> str:
        return f"{found.index}-{found.created}"

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        decoded = self.decode(spec)
        subnet6 = str(parse_subnet(decoded.subnet6, 6)) if decoded.subnet6 is not None else None
        check_mtu(decoded.mtu, has_ipv6=subnet6 is not None)
        return {**form_of(decoded), "subnet": str(parse_subnet(decoded.subnet, 4)), "subnet6": subnet6}

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
