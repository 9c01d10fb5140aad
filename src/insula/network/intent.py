"""The intent of a tenant: the networks, routers, ports and names that it wants on one host, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from insula.model.guarantees import Shaping
from insula.model.objects import Network, Port, Struct, Tenant
from insula.model.policies import AddressGroup, OperatorPolicy, Policy, PortMatch
from insula.model.routers import Router


class PolicyIntent(Struct, kw_only=True):
    """The policies of one tenant, and what they refer to.

    `labels` are those of its instances by name. `operator` are the operator's policies that apply to the tenant, in the
    order in which they are asked.
    """

    policies: Sequence[Policy] = ()
    groups: Sequence[AddressGroup] = ()
    labels: Mapping[str, Mapping[str, str]] = {}
    operator: Sequence[OperatorPolicy] = ()


class RemotePort(Struct, kw_only=True):
    """A port of the tenant on another host. `addresses` are those that it may send from, without the link-local one.

    `host` is the other host's underlay address, the one that it sends tenants' packets to other hosts from.
    """

    network: str
    instance: str
    mac: str
    addresses: Sequence[str]
    host: str


class PeeringIntent(Struct, kw_only=True):
    """A peering with the tenant `peer`, as this tenant sees it. `index` is unique on this cloud.

    `networks` are the names of this tenant's networks in it, and `allow` the ports there that the peer may open
    connections to. `others` are the peer's networks. `names` are the peer's instances there, with their addresses.
    """

    index: int
    name: str
    peer: Tenant
    networks: Sequence[str] = ()
    allow: Sequence[PortMatch] = ()
    others: Sequence[Network] = ()
    names: Mapping[str, Sequence[str]] = {}


class TenantIntent(Struct, kw_only=True):
    """Everything that a fabric installs for one tenant. A new capability of fabrics becomes a field with a default.

    `ports` are those of all instances of this host, running or not: a port is plugged when its instance starts, and
    removed when it is no longer in the intent. `remotes` are the ports on other hosts that ports of this host may
    reach; one that is plugged here is ignored. `names` are all names that the tenant's resolver answers, with their
    addresses. `complete` is False if a record of the store can't be read, so that parts may be missing here: then only
    parts of earlier intents are removed. `shaping` is the tenant's bandwidth on this host; None: nothing is shaped.
    """

    tenant: Tenant
    networks: Sequence[Network] = ()
    routers: Sequence[Router] = ()
    ports: Sequence[Port] = ()
    remotes: Sequence[RemotePort] = ()
    names: Mapping[str, Sequence[str]] = {}
    policy: PolicyIntent = PolicyIntent()
    peerings: Sequence[PeeringIntent] = ()
    complete: bool = True
    shaping: Shaping | None = None
