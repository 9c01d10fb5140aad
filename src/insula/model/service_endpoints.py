"""Service endpoints: addresses in a tenant's own network, each of which is one port of an instance of another tenant.

They need an active peering, and work also where the two tenants' networks have the same addresses.
"""

from __future__ import annotations

from typing import Literal

from insula.model import fields
from insula.model.objects import Struct
from insula.model.peerings import DEFAULT_NAME

FIRST_NUMBER, LAST_NUMBER = 3, 254
"""The numbers of the endpoints of one peering."""


class ServiceEndpoint(Struct, kw_only=True):
    """An endpoint on `network` of `tenant`. It leads to `port` of `instance` of the tenant `peer`, by `peering`.

    `number` tells it from the other endpoints of the peering.
    """

    tenant: str
    name: str
    network: str
    address: str
    address6: str | None = None
    peer: str
    peering: str
    instance: str
    protocol: Literal["tcp", "udp"]
    port: int
    number: int
    created: float


class ServiceEndpointSpec(Struct, kw_only=True):
    """The request of `insula endpoint create`. Without addresses free ones of the network are chosen."""

    name: fields.Label
    network: fields.Label
    peer: fields.Label
    peering: fields.Label = DEFAULT_NAME
    instance: fields.Label
    protocol: Literal["tcp", "udp"] = "tcp"
    port: fields.PortNumber
    address: fields.IpAddress | None = None
    address6: fields.IpAddress | None = None
