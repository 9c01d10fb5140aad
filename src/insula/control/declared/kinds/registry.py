"""The registry of kinds, in the order in which they are created. A new kind is a file here, and a line below."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import msgspec

from insula.control.declared.kinds.base import DeclaredKind
from insula.control.declared.kinds.floating_ip import FloatingIpKind
from insula.control.declared.kinds.guarantee import GuaranteeKind
from insula.control.declared.kinds.identities import BindingKind, ServiceAccountKind, UserKind
from insula.control.declared.kinds.instance import InstanceKind
from insula.control.declared.kinds.load_balancer import LoadBalancerKind
from insula.control.declared.kinds.network import NetworkKind
from insula.control.declared.kinds.operator_policy import OperatorPolicyKind
from insula.control.declared.kinds.policy import AddressGroupKind, PolicyKind
from insula.control.declared.kinds.router import RouterKind
from insula.control.declared.kinds.tenant import TenantKind

KINDS: Mapping[str, DeclaredKind] = {
    kind.name: kind
    for kind in (
        TenantKind(),
        OperatorPolicyKind(),
        UserKind(),
        ServiceAccountKind(),
        BindingKind(),
        NetworkKind(),
        RouterKind(),
        AddressGroupKind(),
        PolicyKind(),
        InstanceKind(),
        FloatingIpKind(),
        LoadBalancerKind(),
        GuaranteeKind(),
    )
}
RANK: Mapping[str, int] = {name: number for number, name in enumerate(KINDS)}


@functools.cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of one document."""
    union = functools.reduce(operator.or_, (kind.document for kind in KINDS.values()))
    found = msgspec.json.schema(union)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Insula, declared state", **found}
