"""Peerings in the store: their records, and the networks that a tenant reaches by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from insula.control.allocation.reservations import Reservation
from insula.control.instances.specs import cli_command
from insula.control.keys import ENDPOINTS, NETWORKS, PEERINGS
from insula.model.errors import Conflict
from insula.model.objects import Network
from insula.model.peerings import Peering
from insula.model.service_endpoints import ServiceEndpoint
from insula.network.addresses import Subnet
from insula.network.routes import subnets
from insula.store.protocol import Delete, Store, Write

INDEX = "peering-index"


def puts(peering: Peering) -> list[Write]:
    """The writes that store a peering below both its tenants."""
    return [PEERINGS.put(peering, *key) for key in keys(peering)]


def deletes(peering: Peering) -> list[Delete]:
    """The writes that delete a peering and its reservation."""
    return [*(PEERINGS.delete(*key) for key in keys(peering)), reservation(peering).delete()]


def keys(peering: Peering) -> Sequence[tuple[str, str, str]]:
    one, two = peering.offered.tenant, peering.to
    return (one, two, peering.name), (two, one, peering.name)


def reservation(peering: Peering) -> Reservation:
    return Reservation(INDEX, str(peering.index), f"{peering.offered.tenant}/{peering.to}/{peering.name}")


async def endpoints_of(store: Store, peering: Peering) -> list[ServiceEndpoint]:
    """The service endpoints of a peering, of both its tenants."""
    found = []
    for tenant in (peering.offered.tenant, peering.to):
        for each in await ENDPOINTS.list(store, tenant):
            if (each.peer, each.peering) == (peering.other(tenant), peering.name):
                found.append(each)
    return found


def endpoint_reservations(endpoint: ServiceEndpoint) -> list[Reservation]:
    """The reservations of an endpoint's addresses, of the kind that ports have."""
    kind, owner = f"address/{endpoint.tenant}/{endpoint.network}", f"{endpoint.tenant}/endpoint:{endpoint.name}"
    return [Reservation(kind, each, owner) for each in (endpoint.address, endpoint.address6) if each]


def endpoint_deletes(endpoint: ServiceEndpoint) -> list[Delete]:
    """The writes that delete an endpoint and its reservations."""
    own = [each.delete() for each in endpoint_reservations(endpoint)]
    return [ENDPOINTS.delete(endpoint.tenant, endpoint.name), *own]


async def networks_beyond(store: Store, tenant: str) -> list[Network]:
    """The networks of other tenants that a tenant reaches by its peerings."""
    found = []
    for peering in await PEERINGS.list(store, tenant):
        side = peering.side(peering.other(tenant)) if peering.is_routed else None
        if side is not None:
            found += [each for each in await NETWORKS.list(store, side.tenant) if each.name in side.networks]
    return found


async def first_overlap(store: Store, tenant: str, wanted: Iterable[Subnet]) -> str | None:
    """A network of the tenant, or one beyond a peering, that has addresses of these subnets; as text."""
    texts = list(wanted)
    for network in [*await NETWORKS.list(store, tenant), *await networks_beyond(store, tenant)]:
        if any(overlap(own, other) for own in subnets(network) for other in texts):
            of = "" if network.tenant == tenant else f" of peer {network.tenant}"
            return f"network {network.name}{of}"
    return None


async def check_beyond(store: Store, tenant: str, wanted: Iterable[Subnet]) -> None:
    """Conflict if one of these subnets overlaps a network that the tenant reaches by a peering."""
    texts = list(wanted)
    for network in await networks_beyond(store, tenant):
        for subnet in texts:
            if any(overlap(own, subnet) for own in subnets(network)):
                what = f"subnet {subnet} overlaps network {network.name} of peer {network.tenant}"
                raise Conflict(what, "choose another range, or end the peering")


async def refuse_if_peered(store: Store, tenant: str, network: str) -> None:
    """Conflict if a network is in a peering, or in an offer of the tenant, or has a service endpoint."""
    for peering in await PEERINGS.list(store, tenant):
        side = peering.side(tenant)
        if side and network in side.networks:
            end = cli_command(tenant, f"peer end {peering.other(tenant)} --name {peering.name}")
            raise Conflict(f"network {network} is in a peering with {peering.other(tenant)}", f"{end} ends it")
    for endpoint in await ENDPOINTS.list(store, tenant):
        if endpoint.network == network:
            remove = cli_command(tenant, f"endpoint rm {endpoint.name}")
            raise Conflict(f"network {network} has the service endpoint {endpoint.name}", f"{remove} removes it")


def overlap(one: Subnet, other: Subnet) -> bool:
    return one.version == other.version and one.overlaps(other)
