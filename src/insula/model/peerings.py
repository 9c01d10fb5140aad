"""Peerings: two tenants let some of their networks reach each other.

One tenant offers, the other accepts, and either ends it. Each side names its own networks, and the ports there that the
other tenant may open connections to. Answers belong to their connection. Both tenants' policies hold as well.
"""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Annotated, Literal

from insula.model import fields
from insula.model.objects import Struct
from insula.model.policies import PortMatch, PortMatches

MAX_PEERINGS = 64
"""Peerings that a tenant may have offered or accepted."""
MAX_NETWORKS = 16
"""Networks of each side."""
MAX_PORTS = 1024
"""Ports of each side, ranges counted port by port; a protocol without ports is one."""
EVERYTHING = [PortMatch(protocol="tcp"), PortMatch(protocol="udp"), PortMatch(protocol="icmp")]
"""What an offer allows unless it says otherwise."""
DEFAULT_NAME = "peering"
DOMAIN = "peer"
"""The top-level domain of instances beyond a peering, as in web.acme.peer. It isn't one of the DNS."""

NetworkNames = Annotated[list[fields.Label], fields.at_most(MAX_NETWORKS)]


class PeeringSide(Struct, kw_only=True):
    """One tenant's part of a peering: its networks, and the ports that the other tenant may open connections to.

    Without networks the other tenant reaches it by service endpoints only, whose addresses may overlap.
    """

    tenant: str
    networks: list[str]
    allow: list[PortMatch]


class Peering(Struct, kw_only=True):
    """A peering of two tenants. `index` is unique on this cloud: it names the devices. `accepted` is None until the
    tenant `to` has accepted the offer."""

    name: str
    index: int
    offered: PeeringSide
    to: str
    accepted: PeeringSide | None = None
    created: float

    @property
    def is_routed(self) -> bool:
        """Whether it is active, and the networks of both sides reach each other by their addresses."""
        return bool(self.accepted and self.accepted.networks and self.offered.networks)

    def side(self, tenant: str) -> PeeringSide | None:
        """Return the part of one of the two tenants; None if it has not accepted yet."""
        return self.offered if tenant == self.offered.tenant else self.accepted

    def other(self, tenant: str) -> str:
        """Return the name of the other tenant."""
        return self.to if tenant == self.offered.tenant else self.offered.tenant


# -- requests and answers --------------------------------------------------------------------------------------------


class PeeringOffer(Struct, kw_only=True):
    """The request of `insula peer offer`. `allow` is everything unless it is given."""

    to: fields.Label
    name: fields.Label = DEFAULT_NAME
    networks: NetworkNames
    allow: PortMatches | None = None


class PeeringAcceptance(Struct, kw_only=True):
    """The request of `insula peer accept`. Without `allow` the other tenant opens no connections. Without networks
    the peering is for service endpoints only, and addresses may overlap."""

    networks: NetworkNames
    allow: PortMatches = []


class PeeredNetwork(Struct, kw_only=True):
    """A network of the other tenant in a peering."""

    name: str
    subnet: str
    subnet6: str | None = None


class PeeringView(Struct, kw_only=True):
    """A peering as `tenant` sees it, which may connect to `peer_allow` in `peer_networks`; `peer` may connect to
    `allow` in `networks`. A side that has not accepted yet is empty."""

    tenant: str
    peer: str
    name: str
    state: Literal["offered", "active"]
    offered_by: str
    networks: list[str]
    allow: list[PortMatch]
    peer_networks: list[PeeredNetwork]
    peer_allow: list[PortMatch]
    created: float
