"""Service endpoints: create, look at, remove.

An endpoint takes addresses of its network, and a number of its peering. Its creation rewrites the peering's records, so
that of two endpoints made at once each has its own number, and none is made in a peering that ends.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import AsyncExitStack
from ipaddress import ip_network

from insula.control.allocation.transaction import Proposal, allocate, guard, retried, turn
from insula.control.context import Context
from insula.control.instances.specs import cli_command
from insula.control.keys import ENDPOINTS, INSTANCES, NETWORKS, PEERINGS, USAGE
from insula.control.networks.controller import NetworkController
from insula.control.networks.peering_records import endpoint_reservations, endpoints_of, puts
from insula.control.tenants import Tenants
from insula.model.errors import Conflict, InsulaError, Invalid, NotFound
from insula.model.objects import Network
from insula.model.peerings import Peering, PeeringSide
from insula.model.service_endpoints import FIRST_NUMBER, LAST_NUMBER, ServiceEndpoint, ServiceEndpointSpec
from insula.model.units import check_label
from insula.network import addresses
from insula.store.typed import Found


class ServiceEndpoints:
    def __init__(self, context: Context, tenants: Tenants, controller: NetworkController) -> None:
        self.context = context
        self.tenants = tenants
        self.controller = controller

    async def find(self, tenant: str, name: str) -> Found[ServiceEndpoint]:
        """The endpoint and its revision, or NotFound."""
        check_label("tenant", tenant)
        if found := await ENDPOINTS.get(self.context.store, tenant, check_label("endpoint", name)):
            return found
        await self.tenants.find(tenant)
        raise NotFound(f"tenant {tenant} has no endpoint {name}", f"{cli_command(tenant, 'endpoint ls')} lists them")

    async def get(self, tenant: str, name: str) -> ServiceEndpoint:
        return (await self.find(tenant, name)).value

    async def list(self, tenant: str) -> list[ServiceEndpoint]:
        await self.tenants.find(tenant)
        return [*await ENDPOINTS.readable(self.context.store, tenant)]

    async def create(self, tenant: str, spec: ServiceEndpointSpec) -> ServiceEndpoint:
        """Create an endpoint and wait until it works. Invalid, Conflict, NotFound; Failed changes nothing."""
        for what in ("network", "peer", "peering", "instance", "name"):
            check_label("tenant" if what == "peer" else what, getattr(spec, what))
        await self.tenants.find(tenant)
        store, allocators = self.context.store, self.context.allocators

        async def propose() -> Proposal[ServiceEndpoint]:
            usage = await guard(store, tenant)
            peering = await self._peering(tenant, spec)
            network = await self._network(tenant, spec.network)
            number = await self._number(peering.value)
            async with AsyncExitStack() as undo:
                taken = allocators.of(f"address/{tenant}/{spec.network}")
                address = await self._address(network, network.subnet, spec.address)
                undo.callback(taken.release, address)
                address6 = None
                if network.subnet6:
                    address6 = await self._address(network, network.subnet6, spec.address6)
                undo.pop_all()
            endpoint = ServiceEndpoint(
                tenant=tenant,
                name=spec.name,
                network=spec.network,
                address=address,
                address6=address6,
                peer=spec.peer,
                peering=spec.peering,
                instance=spec.instance,
                protocol=spec.protocol,
                port=spec.port,
                number=number,
                created=time.time(),
            )
            compares = [
                USAGE.unchanged(usage, tenant),
                PEERINGS.unchanged(peering, tenant, spec.peer, spec.peering),
                ENDPOINTS.absent(tenant, spec.name),
            ]
            writes = [ENDPOINTS.put(endpoint, tenant, spec.name), USAGE.put(usage.value, tenant), *puts(peering.value)]
            return Proposal(endpoint, endpoint_reservations(endpoint), compares, writes)

        def refuse(key: str, _: ServiceEndpoint) -> None:
            if key == ENDPOINTS.key(tenant, spec.name):
                raise Conflict(f"tenant {tenant} has an endpoint {spec.name} already", "choose another name")

        async with turn(store, tenant):
            endpoint = (await allocate(store, allocators, propose, refuse)).value
        try:
            await self._installed(endpoint)
        except BaseException:
            await self._delete(tenant, spec.name)
            raise
        return endpoint

    async def _peering(self, tenant: str, spec: ServiceEndpointSpec) -> Found[Peering]:
        """The peering, which is active, and allows the port. Conflict, NotFound."""
        found = await PEERINGS.get(self.context.store, tenant, spec.peer, spec.peering)
        ls = cli_command(tenant, "peer ls")
        if found is None:
            raise NotFound(f"tenant {tenant} has no peering {spec.peering} with {spec.peer}", f"{ls} lists them")
        side = found.value.side(spec.peer)
        if side is None or found.value.accepted is None:
            raise Conflict(f"peering {spec.peering} with {spec.peer} is only offered", f"see {ls}")
        if not _allows(side, spec):
            what = f"{spec.peer} does not open {spec.protocol}/{spec.port} in peering {spec.peering}"
            raise Invalid(what, f"{ls} tells what it opens")
        ports = [
            port
            for instance in await INSTANCES.list(self.context.store, spec.peer)
            if instance.name == spec.instance
            for port in instance.ports
            if port.network in side.networks
        ]
        if not ports:
            what = f"{spec.peer} has no instance {spec.instance} on the networks of peering {spec.peering}"
            raise NotFound(what, f"these are {', '.join(side.networks)}")
        return found

    async def _network(self, tenant: str, name: str) -> Network:
        if found := await NETWORKS.get(self.context.store, tenant, name):
            return found.value
        raise NotFound(f"tenant {tenant} has no network {name}", f"{cli_command(tenant, 'network ls')} lists them")

    async def _number(self, peering: Peering) -> int:
        taken = {each.number for each in await endpoints_of(self.context.store, peering)}
        for number in range(FIRST_NUMBER, LAST_NUMBER + 1):
            if number not in taken:
                return number
        most = LAST_NUMBER - FIRST_NUMBER + 1
        raise Conflict(f"peering {peering.name} has {most} endpoints, the most it may have", "remove some")

    async def _address(self, network: Network, subnet: str, wanted: str | None) -> str:
        allocator = self.context.allocators.of(f"address/{network.tenant}/{network.name}")
        return await allocator.choose(lambda taken: addresses.allocate(ip_network(subnet), taken, wanted))

    async def _installed(self, endpoint: ServiceEndpoint) -> None:
        for tenant in (endpoint.peer, endpoint.tenant):
            errors = await self.controller.converged(tenant)
            if error := errors.get("all") or errors.get("endpoints") or errors.get(f"network {endpoint.network}"):
                raise error

    async def remove(self, tenant: str, name: str) -> None:
        """Remove an endpoint. Open connections through it are cut when it returns."""
        await self.find(tenant, name)
        await self._delete(tenant, name)

    async def _delete(self, tenant: str, name: str) -> None:
        async def attempt() -> ServiceEndpoint | None:
            found = await ENDPOINTS.get(self.context.store, tenant, name)
            if found is None:
                return None
            own = [each.delete() for each in endpoint_reservations(found.value)]
            compare = ENDPOINTS.unchanged(found, tenant, name)
            await self.context.store.transact([compare], [ENDPOINTS.delete(tenant, name), *own])
            return found.value

        removed: ServiceEndpoint | None = await retried(attempt)
        for each in (tenant, removed.peer) if removed else ():
            with contextlib.suppress(InsulaError):  # the tenant was removed, or everything is being taken down
                await self.controller.converged(each)
        if removed:
            self.context.allocators.release(endpoint_reservations(removed))


def _allows(side: PeeringSide, spec: ServiceEndpointSpec) -> bool:
    """Whether this side of a peering opens the port."""
    return any(
        match.protocol == spec.protocol
        and (match.port is None or match.port <= spec.port <= (match.end_port or match.port))
        for match in side.allow
    )
