"""The intent of a tenant: the networks, routers, ports and names that it wants on one host, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from insula.model.guarantees import Shaping
from insula.model.objects import Network, Port, PublishedPort, Struct, Tenant
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


class Forward(Struct, kw_only=True):
    """A published port, and the addresses of the instance that it leads to."""

    published: PublishedPort
    addresses: Sequence[str]


class FloatingIntent(Struct, kw_only=True):
    """An external address of the tenant. All packets to `target`, an address of an instance, and from it to the outside
    are translated one to one; with None only published ports and balancers use the address."""

    address: str
    target: str | None = None


class BalancerListener(Struct, kw_only=True):
    """An address and port where a balancer is reached. None is every address of the host; `network` is the network that
    an internal address belongs to."""

    address: str | None
    port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    network: str | None = None


class BalancerIntent(Struct, kw_only=True):
    """A layer-4 load balancer. `index` is unique on this cloud. `backends` are the addresses and ports that get new
    connections, those that are healthy. With `affinity` all connections of a client's address go to one backend."""

    index: int
    listeners: Sequence[BalancerListener]
    backends: Sequence[tuple[str, int]] = ()
    affinity: bool = False


class OutsideIntent(Struct, kw_only=True):
    """What the tenant offers to the outside: published ports, floating addresses and load balancers."""

    forwards: Sequence[Forward] = ()
    floating: Sequence[FloatingIntent] = ()
    balancers: Sequence[BalancerIntent] = ()


class RemotePort(Struct, kw_only=True):
    """A port of the tenant on another host. `addresses` are those that it may send from, without the link-local one.

    `host` is the other host's underlay address, the one that it sends tenants' packets to other hosts from.
    """

    network: str
    instance: str
    mac: str
    addresses: Sequence[str]
    host: str


class PeerPort(Struct, kw_only=True):
    """A port of a peer on another host: its addresses, without the link-local one, and that host's underlay address."""

    addresses: Sequence[str]
    host: str


class ConsumedService(Struct, kw_only=True):
    """A service endpoint of a tenant: addresses in its own `network` that are one port of an instance of the peer.

    `number` tells the services of a peering apart. `host` is the underlay address of the host with the instance, None
    if it is this one.
    """

    number: int
    network: str
    addresses: Sequence[str]
    protocol: Literal["tcp", "udp"]
    port: int
    host: str | None = None


class ProvidedService(Struct, kw_only=True):
    """What a service endpoint of the peer leads to: a port of an instance, with its addresses."""

    number: int
    addresses: Sequence[str]
    protocol: Literal["tcp", "udp"]
    port: int


class PeeringIntent(Struct, kw_only=True):
    """A peering with the tenant `peer`, as this tenant sees it. `index` is unique on this cloud.

    `networks` are the names of this tenant's networks in it, and `allow` the ports there that the peer may open
    connections to. `others` are the peer's networks, and `opened` the ports that this tenant may open connections to.
    `names` are the peer's instances there, with their addresses, and this tenant's service endpoints to the peer.
    Unless `routed`, the two sides may have the same addresses, and reach each other by service endpoints only:
    `consumes` are this tenant's, `provides` what those of the peer lead to.

    `remotes` are the peer's ports on other hosts. What comes from there has this tenant's `vni`, and what goes there
    the `peer_vni` (RFC 7348); both are unique on this cloud, as those of networks. `client` is the number by which
    service endpoints tell what this host's instances send from what others do, and `clients` has the underlay addresses
    of the peer's hosts by theirs: these numbers are unique among the hosts and services of the peering.
    """

    index: int
    name: str
    peer: Tenant
    networks: Sequence[str] = ()
    allow: Sequence[PortMatch] = ()
    others: Sequence[Network] = ()
    opened: Sequence[PortMatch] = ()
    names: Mapping[str, Sequence[str]] = {}
    routed: bool = True
    consumes: Sequence[ConsumedService] = ()
    provides: Sequence[ProvidedService] = ()
    remotes: Sequence[PeerPort] = ()
    vni: int | None = None
    peer_vni: int | None = None
    client: int | None = None
    clients: Mapping[int, str] = {}


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
    outside: OutsideIntent = OutsideIntent()
    complete: bool = True
    shaping: Shaping | None = None
