"""Objects about addresses that are reached from outside: who uses which port."""

from __future__ import annotations

from typing import Literal

from insula.model.objects import Struct


class ExternalClaim(Struct, kw_only=True):
    """The user of a range of ports of an external address: an instance that publishes them, a load balancer, or a
    floating address that is attached to an instance, which has all its ports. `id` is the instance's."""

    tenant: str
    kind: Literal["instance", "floating-ip", "load-balancer"]
    name: str
    id: str
